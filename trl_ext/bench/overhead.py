"""Overhead of trl_ext: a step with idle plugins and with GDPO, as a ratio to plain TRL, from one run.

The trainers take turns, one training step each, on one thread. Processor time is compared, so other work of the machine
does not count. Where the memory of a trainer lies shifts all of its steps by a percent. Trainers are therefore built
several times, each time in another order, and a second plain trainer shows how much of that shift remains. The model is
a random four-layer Qwen2. A larger model makes the overhead smaller.
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
from ..support.quiet import quiet
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


WARM_UP = 2
"""Steps of every trainer that are not counted."""
ARMS: dict[str, str | None] = {
    "plain TRL": None,
    "plain TRL, a second trainer": None,
    "idle plugin, every stage observed": "trl_ext.bench.overhead:Observer",
    "gdpo": "gdpo",
}


def measure(steps: int = 40, progress: Callable[[int, int], None] = lambda done, total: None) -> list[dict[str, Any]]:
    """Measures the processor time of a step in every arm, and its ratio to plain TRL.

    Args:
        steps: Training steps of each trainer. Every arm has as many trainers, one after the other, as there are arms.
        progress: Called with the finished and the total number of rounds.

    Returns:
        For each arm `name`, `seconds` (median step), `ratio` (median over rounds of the ratio to plain TRL in the same
        round), and `ratio_low` and `ratio_high` (95% bootstrap interval of that median).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle threads that spin would count as work
    names, total = list(ARMS), len(ARMS) * (steps + WARM_UP)
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            model = tiny_model(f"{folder}/model", hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
            for block in range(len(names)):
                order = (*names[block:], *names[:block])
                trainers = {name: _trainer(ARMS[name], model, f"{folder}/{block}", steps) for name in order}
                before = block * (steps + WARM_UP)
                block_times = step_times(
                    trainers,
                    lambda rounds, before=before: progress(before + rounds, total),  # type: ignore[misc]
                    time.process_time,
                )
                for name, values in block_times.items():
                    times[name] += values[WARM_UP:]
    finally:
        torch.set_num_threads(threads)
    rows = []
    for name in names:
        ratios = [seconds / plain for seconds, plain in zip(times[name], times[names[0]], strict=True)]
        low, high = interval(ratios)
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(times[name]),
                "ratio": statistics.median(ratios),
                "ratio_low": low,
                "ratio_high": high,
            }
        )
    return rows


def _trainer(plugin: str | None, model: str, folder: str, steps: int) -> Any:
    # every completion has the same length, so that all arms do the same work
    settings: dict[str, Any] = {"logging_steps": 1000, "generation_kwargs": {"min_new_tokens": 8}}
    trainer = tiny_trainer("grpo", model, folder, max_steps=steps + WARM_UP, **settings)
    return trainer if plugin is None else api.attach(trainer, plugin)


def interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of a median."""
    data = torch.tensor(values, dtype=torch.float64)
    picks = torch.randint(len(data), (draws, len(data)), generator=torch.Generator().manual_seed(0))
    medians = data[picks].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
