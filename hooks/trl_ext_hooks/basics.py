"""Kinds of trainers, modes, roles, metrics and masks: the words that every stage uses.

Axis letters: `b` rows of a generation round on this process, `N = b * processes` rows of all processes, `G` rows of a
group, `F` reward functions, `m` rows of a micro-batch, `P` padded prompt tokens, `T` padded completion tokens (`T` may
differ between processes). Rows are ordered by process: this process owns rows `offset .. offset + b - 1` of the `N`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

TrainerKind = Literal["grpo", "rloo", "dpo"]
Mode = Literal["train", "eval"]
Role = Literal["policy", "old", "reference"]

Metric = tuple[float, float]
"""A sum and a count; the core adds both over processes and reports their ratio."""


@dataclass(frozen=True)
class MetricLog:
    """The metrics that hooks log in one round or micro-batch.

    Attributes:
        plugin: The plugin that logs now.
        values: `<plugin>/<name>` -> sum and count, of all plugins.
    """

    plugin: str = ""
    values: dict[str, Metric] = field(default_factory=dict)

    def of(self, plugin: str) -> MetricLog:
        """Returns the same log for another plugin."""
        return MetricLog(plugin, self.values)

    def add(self, name: str, values: torch.Tensor | float, count: torch.Tensor | float | None = None) -> None:
        """Adds values to a metric; see `Logs.log`."""
        amount, number = _sum_and_count(values, count)
        before, counted = self.values.get(f"{self.plugin}/{name}", (0.0, 0.0))
        self.values[f"{self.plugin}/{name}"] = (before + amount, counted + number)


@dataclass(frozen=True)
class Logs:
    """What the stages of a round and of a micro-batch have in common: hooks can log metrics from them."""

    metric_log: MetricLog = field(default_factory=MetricLog, kw_only=True, repr=False, compare=False)

    def log(self, name: str, values: torch.Tensor | float, count: torch.Tensor | float | None = None) -> None:
        """Reports the metric `<plugin>/<name>`, a mean over all processes. Not collective.

        A tensor without `count` adds its entries that are not NaN, a number counts once. With `count`, the sum of
        `values` is divided by it. What is logged twice under one name is added up. Every hook that gets such an object
        can log, but `inspect`, whose metrics nobody reads.

        Args:
            name: Name of the metric inside the plugin.
            values: Values to average, or their sum.
            count: What the sum is divided by. A metric whose count is 0 on all processes is not reported.
        """
        self.metric_log.add(name, values, count)


def _sum_and_count(values: torch.Tensor | float, count: torch.Tensor | float | None) -> Metric:
    """Returns a sum and a count as plain numbers; tensors are told by their methods, so that torch stays unimported."""
    if isinstance(values, int | float):
        return float(values), 1.0 if count is None else float(count)
    if not hasattr(values, "isnan"):
        raise TypeError(f"a metric is logged from a tensor or a number, got {type(values).__name__}")
    values = values.detach()
    if count is not None:
        return float(values.sum()), float(count)
    known = ~values.isnan()
    return float(values[known].double().sum()), float(known.sum())


def loss_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """1 on the tokens that the loss counts: those of completions that the model wrote."""
    mask: torch.Tensor = batch["completion_mask"]
    tool_mask = batch.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask
