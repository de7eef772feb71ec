"""Columns that plugins need: kept in training and evaluation where TRL would drop them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, TrainerKind, hookimpl


def reader(*columns: str) -> type[Plugin]:
    """Makes a plugin that remembers the columns of the rows it sees, by mode."""

    class Reader(Plugin):
        name = "reader"
        trainers = ("grpo", "rloo")
        needs = tuple(f"column:{name}" for name in columns)

        def start(self) -> None:
            self.seen: dict[str, list[dict[str, Any]]] = {}

        @hookimpl
        def rewards(self, scored: Any) -> None:
            self.seen[scored.mode] = scored.rows

    return Reader


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("late", [False, True], ids=["enable", "attach"])
def test_a_needed_column_stays(kind: TrainerKind, late: bool, build: Any, plugin: Callable[..., str]) -> None:
    """In training and evaluation, and no longer than the plugin is there."""
    settings: dict[str, Any] = {
        "remove_unused_columns": True,
        "max_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    settings |= {"per_device_eval_batch_size": 8, "trainer": {"eval_dataset": tiny_data(rows=2)}}
    name = plugin(reader("index"))
    with contextlib.nullcontext() if late else trl_ext.enable(name):
        trainer = build(kind, **settings)
        if late:
            trl_ext.attach(trainer, name)
        trainer.train()
        seen = trainer._trl_ext.plugins["reader"].seen
        if late:
            trl_ext.detach(trainer)
    assert set(seen) == {"train", "eval"} and all(set(rows[0]) == {"prompt", "index"} for rows in seen.values())
    assert all(row["prompt"] == tiny_data()[row["index"]]["prompt"] for rows in seen.values() for row in rows)
    trainer._set_signature_columns_if_needed()
    assert "index" not in trainer._signature_columns


def test_other_columns_are_dropped_as_before(build: Any, plugin: Callable[..., str]) -> None:
    with trl_ext.enable(plugin(reader())):
        trainer = build("grpo", remove_unused_columns=True, max_steps=1)
        trainer.train()
        assert set(trainer._trl_ext.plugins["reader"].seen["train"][0]) == {"prompt"}
