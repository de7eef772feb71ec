"""`trl_ext train --config RECIPE` trains on the task of the recipe, with the plugins of its block."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from trl_ext.cli import main
from trl_ext.train import worker

from ..compare.conftest import ROUNDS


@pytest.mark.slow
def test_it_trains_on_the_task(recipe: Any, cache: str, tmp_path: Path) -> None:
    path = recipe({"train_size": 16, "arms": {"a": None, "b": None}}, save_strategy="no", logging_steps=1)
    environment = os.environ | {"TRL_EXT_CACHE": cache, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "trl_ext", "train", "--config", path, "--output_dir", "out", "--max_steps", "2"]
    done = processes.run(command, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 2/2" in done.stdout and "digits" in done.stdout and "embedded" not in done.stderr
    found = json.loads((tmp_path / "out/trl_ext_run.json").read_text())
    assert found["data"].endswith("tiny_task.py:TINY") and found["hooks_fired"]["gdpo"]["advantages"] == 2
    assert found["model"].startswith(cache) and (tmp_path / "out/model.safetensors").is_file()


def test_an_unknown_trainer_in_the_block(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--config", recipe({"trainer": "gpro"})]) == 2
    assert "experiment.trainer is 'gpro'. Did you mean 'grpo'?" in capsys.readouterr().err


def test_a_plugin_that_owns_the_run_takes_the_task(
    recipe: Any, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handed_over: Any
) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    unused = {"num_generations": None, "max_completion_length": None, "beta": None}
    small = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False}
    path = recipe({"trainer": "dpo"}, {"apo": ROUNDS | {"rounds": 1}}, max_steps=1, **unused, **small)
    assert worker.main([handed_over("--config", path, "--output_dir", "out")]) == 0
    (entry,) = json.loads((tmp_path / "out/trl_ext_rounds.json").read_text())
    assert entry["step"] == 1 and 0 <= entry["apo/reward"] <= 1
    assert (tmp_path / "out/model.safetensors").is_file()
