"""The code in the guide runs, and its YAML trains."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml

import trl_ext.environments
from tests import processes
from trl_ext.testing import calls

README = (Path(trl_ext.environments.__file__).parent / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
(YAML,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
HUB = "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs(code: str, tool_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As printed, but with a model that is on this disk, on a CPU, and shorter."""
    monkeypatch.chdir(tmp_path)
    assert ("GRPOTrainer(" in code) == (HUB in code)
    script = code.replace(HUB, tool_model).replace("max_completion_length=2048", "max_completion_length=64")
    script = script.replace('GRPOConfig("run",', 'GRPOConfig("run", use_cpu=True, bf16=False, report_to="none",')
    done = processes.run_python(script)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_yaml_file_trains_on_the_rows_of_the_script(tool_model: str, tmp_path: Path) -> None:
    (script,) = [code for code in PYTHON if "to_json" in code]
    settings = yaml.safe_load(YAML) | {
        "model_name_or_path": tool_model,
        "output_dir": str(tmp_path / "out"),
        "max_completion_length": 200,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "max_tool_calling_iterations": 2,
        "generation_kwargs": json.dumps(calls(tool_model, "act", likelihood=5.0, action="down")),
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    paths = os.pathsep.join(path for path in sys.path if path)
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    for command in ([sys.executable, "-c", script], [sys.executable, "-m", "trl_ext", "train", "--config", "run.yaml"]):
        done = processes.run(command, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "out" / "trl_ext_run.json").read_text()
    assert "environment/steps" in text and "rewards/episode_return/mean" in text


def test_the_prompt_is_the_one_that_is_shown() -> None:
    lake = trl_ext.environments.gym("FrozenLake-v1", actions=["left", "down", "right", "up"])
    shown = re.findall(r"^> (.*)$", README, re.MULTILINE)
    assert lake.prompt() == "".join(line.replace("\\", "") + "\n" for line in shown)


def test_every_option_is_in_the_guide() -> None:
    import inspect

    for name in inspect.signature(trl_ext.environments.gym).parameters:
        if name not in ("env", "options"):
            assert re.search(rf"\b{name}\b", README), name
