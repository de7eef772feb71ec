"""A finished run, the module of reward functions that options name, and a plugin that watches trainers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.plugins.apo import runs
from trl_ext.trl_internals import seams
from trl_ext_hooks import Plugin, hookimpl


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if seams.trl_version() < seams.Version("1.15"):
        for item in items:
            if item.path.is_relative_to(Path(__file__).parent):
                item.add_marker(pytest.mark.skip(reason="needs the fused head of TRL 1.15"))


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apo_rewards", runs.functions())


@pytest.fixture(scope="session")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with alpha 0.3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "apo_rewards", runs.functions())
        return runs.go(model, tmp_path_factory.mktemp("apo") / "run")


class Watch(Plugin):
    """Keeps what every trainer of a run was given and logged."""

    name = "watch"
    trainers = ("dpo",)
    seen: list[Any] = []  # noqa: RUF012  of all trainers

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.seen.append({"beta": trainer.args.beta, "logs": []})
        trainer.add_callback(Listen(self.seen[-1]))


class Listen(TrainerCallback):
    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entry["logs"].append(dict(logs))


@pytest.fixture
def watched() -> Iterator[list[Any]]:
    """What `watch` keeps: a dict for every trainer of the run."""
    Watch.seen.clear()
    yield Watch.seen
    Watch.seen.clear()


@pytest.fixture
def watch(plugin: Callable[[type], str], watched: list[Any]) -> str:
    return plugin(Watch)
