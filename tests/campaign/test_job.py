"""Runs of several trainings: nothing of a training that has ended is kept while the next one is prepared."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import trl_ext
from trl_ext.campaign import job
from trl_ext.compare.run_one import Watch
from trl_ext.testing import tiny_args, tiny_data
from trl_ext.train.command_line import Request
from trl_ext.train.progress import Progress
from trl_ext_hooks import Plugin, ScoredPairs, hookimpl

ALIVE: list[tuple[str, weakref.ref[Any]]] = []
"""What trainers hold, by name."""
SEEN: list[list[str]] = []
"""What of it was alive after each training."""


class Twice(Plugin):
    """Trains twice, and looks after each training for what is alive."""

    name = "twice"
    trainers = ("dpo",)

    @hookimpl
    def run(self, job: Any) -> None:
        for number in range(2):
            job.train(job.model, job.data, f"part-{number}")
            SEEN.append([name for name, reference in ALIVE if reference() is not None])

    @hookimpl
    def pair_metrics(self, pairs: ScoredPairs) -> None:
        pairs.log("ones", pairs.mask.sum(dim=1) * 0 + 1)


class Take(TrainerCallback):
    """Takes weak references of what is big."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ALIVE.extend((name, weakref.ref(kwargs[name])) for name in ("model", "optimizer", "lr_scheduler"))


def follow(trainer: Any) -> None:
    ALIVE.extend([("trainer", weakref.ref(trainer)), ("reference", weakref.ref(trainer.ref_model))])
    trainer.add_callback(Take())


def progress(request: Any, parsed: Any) -> Callable[[Any], None]:
    return Progress(request, parsed, lines=True).follow


def watch(request: Any, parsed: Any) -> Callable[[Any], None]:
    return Watch(lambda message: None, several=True).follow


@pytest.fixture
def seen() -> list[list[str]]:
    ALIVE.clear()
    SEEN.clear()
    return SEEN


@pytest.mark.parametrize("follower", [progress, watch])
def test_nothing_of_an_ended_training_is_alive(
    follower: Callable[[Any, Any], Callable[[Any], None]],
    seen: list[list[str]],
    model: str,
    plugin: Callable[[type], str],
    tmp_path: Path,
) -> None:
    """As the command line and a comparison follow their trainers."""
    args = tiny_args("dpo", tmp_path, max_steps=1)
    with trl_ext.enable(plugin(Twice)) as handle:
        request = Request({}, handle.specs, "dpo", None, {}, [])
        script, named = (
            type("Script", (), {"dataset_name": "rows"})(),
            type("Model", (), {"model_name_or_path": model})(),
        )
        handle.on_trainer(follower(request, (script, args, named, None)))
        handle.on_trainer(follow)
        job.start(handle.specs, job.LocalJob(model, args, tiny_data("dpo"), None, None))
    assert [name for name, _ in ALIVE] == ["trainer", "reference", "model", "optimizer", "lr_scheduler"] * 2
    assert seen == [[], []]
