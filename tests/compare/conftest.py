"""A tiny task, recipes on it, and comparisons run through the command line in this process."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext.cli import main
from trl_ext.compare.runs import Run

TASK = """
from trl_ext.lab import Shape, Task, WarmUp


def digits(completions, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / max(len(text), 1) for text in texts]


def short(completion_ids, **columns):
    return [1.0 / (1 + len(ids)) for ids in completion_ids]


def rows(split, size, seed):
    start = 1000 * seed + (500 if split == "test" else 0)
    prompts = [[{"role": "user", "content": f"{start + i}+1="}] for i in range(size)]
    right = [[{"role": "assistant", "content": str(start + i + 1)}] for i in range(size)]
    wrong = [[{"role": "assistant", "content": "no"}] for i in range(size)]
    return [dict(prompt=p, chosen=c, rejected=r) for p, c, r in zip(prompts, right, wrong)]


def traces(size, seed):
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows("train", size, seed)]


TINY = Task(
    name="tiny",
    summary="for tests",
    trainers=("grpo", "rloo", "dpo"),
    rows=rows,
    rewards=(digits, short),
    traces=traces,
    shape=Shape(width=16, layers=1, heads=2, feed_forward=32, positions=64),
    warm_up=WarmUp(traces=4, steps=0),
    max_completion_length=4,
    train_size=32,
    test_size=4,
)
"""

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "beta": 0.0,
}
METRIC = {"name": "rewards/digits/mean", "reduce": "mean"}
ROUNDS: dict[str, Any] = {
    "reward_funcs": ["trl_ext.testing.digits"],
    "betas": [0.1],
    "rounds": 2,
    "num_samples": 4,
    "max_completion_length": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "prompts_per_round": 8,
    "held_out": 4,
}
"""Options of `apo` for rounds on the tiny task."""


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Reference of the tiny task."""
    file = tmp_path_factory.mktemp("task") / "tiny_task.py"
    file.write_text(TASK)
    return f"{file}:TINY"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def write_recipe(
    file: Path, task: str | None, experiment: dict[str, Any] | None = None, plugins: Any = None, **settings: Any
) -> str:
    """A recipe with two seeds of plain TRL and GDPO; settings that are None are left out."""
    block = {"task": task, "seeds": 2, "metrics": [METRIC]} | (experiment or {})
    content = {key: value for key, value in (SETTINGS | settings).items() if value is not None}
    content |= {"plugins": {"gdpo": {}} if plugins is None else plugins}
    content |= {"experiment": {key: value for key, value in block.items() if value is not None}}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


@pytest.fixture
def recipe(tmp_path: Path, task: str) -> Callable[..., str]:
    """`recipe(experiment, plugins, **settings)` writes a file and returns its path."""

    def write(
        experiment: dict[str, Any] | None = None, plugins: Any = None, name: str = "small.yaml", **settings: Any
    ) -> str:
        return write_recipe(tmp_path / name, task, experiment, plugins, **settings)

    return write


@pytest.fixture
def compare(
    monkeypatch: pytest.MonkeyPatch, cache: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """`compare(*argv)` runs the command and returns exit code, standard output and standard error."""
    monkeypatch.setenv("TRL_EXT_CACHE", cache)
    monkeypatch.setenv("COLUMNS", "200")  # so that no name is folded
    monkeypatch.chdir(tmp_path)

    def run(*argv: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main.main(["compare", *map(str, argv)])
        return code, *capfd.readouterr()

    return run


def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "compare.json").read_text()))


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> record, of all runs in an output folder."""
    return {file.name: json.loads(file.read_text()) for file in sorted((folder / "runs").glob("*.json"))}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of an arm called `plain`."""
    identity = {"settings": {"beta": 0.0}, "plugins": [], "versions": {"trl": "1.16.0"}}
    return Run("plain", 3, "grpo", {}, {"beta": 0.0}, "tiny", {}, identity, str(tmp_path))


@contextlib.contextmanager
def file_size_limit(process: int, size: int) -> Iterator[None]:
    """A process, and those that it starts, can write no file above a size, as on a full disk."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, before)
