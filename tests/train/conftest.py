"""Folders with a tiny model and data, and the console script as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import processes
from trl_ext.cli import main
from trl_ext.testing import tiny_data
from trl_ext.train import command_line, handover
from trl_ext.trl_internals import launch

from ..compare.conftest import cache, recipe, task

__all__ = ["cache", "config", "data", "recipe", "refused", "script", "task", "write_rows"]

SETTINGS = {
    "reward_funcs": ["trl_ext.testing.digits", "trl_ext.testing.brevity"],
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1.0e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "num_generations": 4,
    "max_completion_length": 8,
}


def write_rows(folder: Path, **splits: list[dict]) -> str:
    """A folder that `load_dataset` reads, with one file per split."""
    folder.mkdir(parents=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> dict[str, str]:
    """Folders with prompts (`grpo`) and with pairs (`dpo`), each with splits `train` and `test`."""
    base = tmp_path_factory.mktemp("data")
    return {
        kind: write_rows(base / kind, train=tiny_data(kind).to_list(), test=tiny_data(kind, rows=4).to_list())
        for kind in ("grpo", "dpo")
    }


@pytest.fixture
def config(tmp_path, model, data):
    """`config(**changes)` writes a YAML file for a run of two steps and returns its path; None leaves a key out."""

    def write(name="run.yaml", kind="grpo", **changes) -> str:
        values = SETTINGS | {
            "model_name_or_path": model,
            "dataset_name": data[kind],
            "output_dir": str(tmp_path / "out"),
        }
        if kind == "dpo":
            for key in ("reward_funcs", "num_generations", "max_completion_length"):
                del values[key]
        values = {key: value for key, value in (values | changes).items() if value is not None}
        (tmp_path / name).write_text(yaml.safe_dump(values))
        return str(tmp_path / name)

    return write


@pytest.fixture
def script(tmp_path):
    """`script(*argv)` runs a program of the environment in an empty folder; the console script `trl_ext` by default."""

    def run(*argv, program="trl_ext", **environment) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", program] if program != "trl" else [sys.executable, "-m", "trl.cli.main"]
        paths = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
        return processes.run([*command, *map(str, argv)], env=env, cwd=tmp_path, timeout=1200)

    return run


@pytest.fixture
def refused(monkeypatch, capsys):
    """`refused(*argv)` runs the console script in this process and returns its error; nothing may be launched."""

    def launched(args):
        raise AssertionError(f"launched {args.training_script_args}")

    monkeypatch.setattr(launch, "launch", launched)

    def run(*argv) -> str:
        code = main.main([*map(str, argv)])
        text = capsys.readouterr().err
        assert code == 2, text
        assert "Traceback" not in text
        return text[text.index("error: ") :]

    return run


@pytest.fixture
def handed_over(tmp_path):
    """`handed_over(*argv)` returns the file that the parent process writes for its workers."""

    def write(*argv) -> str:
        args, rest = command_line.Parser().parse_known_args([*map(str, argv)])
        return str(handover.write(command_line.understand(args, rest), tmp_path))

    return write
