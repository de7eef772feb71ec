"""Metrics that hooks return."""

from __future__ import annotations

from typing import Any

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, hookimpl

ROUNDS = ("grpo", "rloo")


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_metrics_are_sums_over_counts_under_the_plugins_name(build: Any, plugin: Any) -> None:
    class Report(Plugin):
        name = "report"
        trainers = ROUNDS

        @hookimpl
        def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
            return {"ratio": (6, 4), "nothing": (0, 0)}

        @hookimpl
        def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
            return {"rows": (float(len(loss.per_token_logps)), 1)}

    for kind in ROUNDS:
        with trl_ext.enable(plugin(Report)):
            trainer = build(kind, trainer={"eval_dataset": tiny_data().select([0])}, max_steps=2)
            trainer.train()
            trainer.evaluate()
        assert logged(trainer, "report/ratio") == [1.5, 1.5]
        assert logged(trainer, "report/rows") == [8.0, 8.0]
        assert logged(trainer, "eval_report/ratio") == [1.5]
        assert not logged(trainer, "report/nothing")
