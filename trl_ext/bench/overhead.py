"""What the host costs: a step with idle plugins and with GDPO, as a ratio to plain TRL, from one run.

Three trainers take turns, one training step each, on one thread, and processor time is compared, so that what else the
machine does meanwhile does not count. The model is a random four-layer Qwen2; a larger one makes the overhead smaller.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_ext_hooks import Loss, Plugin, Round, hookimpl

from .. import api
from ..conformance import quiet
from ..testing import tiny_model, tiny_trainer
from .turns import step_times


class Observer(Plugin):
    """Looks at every stage and changes nothing."""

    name = "observer"
    trainers = ("grpo",)

    @hookimpl
    def rewards(self, scored: Any) -> None:
        return None

    @hookimpl
    def advantages(self, round: Round) -> None:
        return None

    @hookimpl
    def loss_inputs(self, batch: Any) -> None:
        return None

    @hookimpl
    def loss_metrics(self, loss: Loss) -> dict[str, tuple[float, float]]:
        return {"seen": (1.0, 1.0)}


ARMS: dict[str, str | None] = {
    "plain TRL": None,
    "idle plugin, every stage observed": "trl_ext.bench.overhead:Observer",
    "gdpo": "gdpo",
}


def measure(steps: int = 120, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """Processor time of a step in every arm, and its ratio to plain TRL.

    Returns:
        Per arm `name`, `seconds` (median step), `ratio` (median over rounds of the ratio to plain TRL in the same
        round) and `ratio_low`, `ratio_high` (95% bootstrap interval of that median).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle threads that spin would count as work
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            model = tiny_model(f"{folder}/model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
            # every completion has the same length, so that all arms do the same work
            settings: dict[str, Any] = {"logging_steps": 1000, "generation_kwargs": {"min_new_tokens": 8}}
            trainers: dict[str, Any] = {}
            for name, plugin in ARMS.items():
                trainer = tiny_trainer("grpo", model, f"{folder}/{len(trainers)}", max_steps=steps + 2, **settings)
                trainers[name] = trainer if plugin is None else api.attach(trainer, plugin)
            times = step_times(trainers, lambda done: progress(done, steps + 2), time.process_time)
    finally:
        torch.set_num_threads(threads)
    plain = times["plain TRL"][2:]  # the first steps warm caches up
    rows = []
    for name in ARMS:
        ratios = [own / other for own, other in zip(times[name][2:], plain, strict=True)]
        low, high = interval(ratios)
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(times[name][2:]),
                "ratio": statistics.median(ratios),
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    return rows


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the median."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(0))
    medians = data[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
