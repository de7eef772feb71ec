"""Basics: kinds of trainers, modes, roles, log-probabilities, metrics and masks, which every stage uses.

Axis letters: `b` rows of a round on this process, `N = b * processes` rows of all processes, `G` rows of a group, `F`
reward functions, `m` rows of a micro-batch, `B` rows of one forward, `P` padded prompt tokens, `T` padded completion
tokens (they may differ between processes), `H` size of a hidden state. Pairs of DPO have `2n` rows of `L` tokens.

Rows are ordered by process. This process owns rows `offset .. offset + b - 1` of the `N`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

TrainerKind = Literal["grpo", "rloo", "dpo"]
"""Which trainer: `GRPOTrainer`, `RLOOTrainer` or `DPOTrainer`, or a subclass."""

Mode = Literal["train", "eval"]
"""Whether the trainer trains or evaluates."""

Role = Literal["policy", "old", "reference"]
"""Which log-probabilities a forward computes: the policy's, those after sampling, or the reference model's."""

Metric = tuple[float, float]
"""A sum and a count. The core adds both over processes and reports their ratio."""


@dataclass(frozen=True)
class Logps:
    """Holds what a forward gives for the tokens to score.

    Attributes:
        per_token_logps: (B, T), 0 on masked tokens.
        entropies: (B, T) where asked for, else None.
        aux_loss: Scalar, or None.
        extra: For pairs, the other per-token values of TRL's fused head by its names, such as `mean_logits`.
    """

    per_token_logps: torch.Tensor
    entropies: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricLog:
    """Collects the metrics that hooks log in one round or micro-batch.

    Attributes:
        plugin: Name of the plugin that logs now.
        values: `<plugin>/<name>` -> sum and count, of all plugins.
    """

    plugin: str = ""
    values: dict[str, Metric] = field(default_factory=dict)

    def of(self, plugin: str) -> MetricLog:
        """Returns the same log for another plugin."""
        return MetricLog(plugin, self.values)

    def add(self, name: str, values: torch.Tensor | float, count: torch.Tensor | float | None = None) -> None:
        """Adds values to a metric, as `Logs.log` describes."""
        amount, number = _sum_and_count(values, count)
        before, counted = self.values.get(f"{self.plugin}/{name}", (0.0, 0.0))
        self.values[f"{self.plugin}/{name}"] = (before + amount, counted + number)


@dataclass(frozen=True)
class Logs:
    """Logs metrics: the base class of rounds, micro-batches and batches of pairs."""

    metric_log: MetricLog = field(default_factory=MetricLog, kw_only=True, repr=False, compare=False)

    def log(self, name: str, values: torch.Tensor | float, count: torch.Tensor | float | None = None) -> None:
        """Reports the metric `<plugin>/<name>`, a mean over all processes. Not collective.

        Without `count`, a tensor is averaged over its entries that are not NaN, and a number counts once. With `count`,
        the sum of `values` is divided by it. Calls under one name add up inside a round or micro-batch, and TRL
        averages over the logging interval. Every hook that receives such an object can log, except `inspect`, whose
        metrics are not reported.

        Args:
            name: Name of the metric inside the plugin.
            values: Values to average, or their sum.
            count: Divisor of the sum. A metric whose count is 0 on all processes is not reported.
        """
        self.metric_log.add(name, values, count)


def _sum_and_count(values: torch.Tensor | float, count: torch.Tensor | float | None) -> Metric:
    """Returns a sum and a count as plain numbers."""
    if isinstance(values, int | float):
        return float(values), 1.0 if count is None else float(count)
    # a tensor is recognised by its method, so that torch stays unimported
    if not hasattr(values, "isnan"):
        raise TypeError(f"a metric is logged from a tensor or a number, got {type(values).__name__}")
    values = values.detach()
    if count is not None:
        return float(values.sum()), float(count)
    known = ~values.isnan()
    return float(values[known].double().sum()), float(known.sum())


def loss_mask(batch: Mapping[str, Any]) -> torch.Tensor:
    """Marks the tokens that the loss counts, those that the model wrote, with 1 and others with 0: (rows, T)."""
    mask: torch.Tensor = batch["completion_mask"]
    tool_mask = batch.get("tool_mask")
    return mask if tool_mask is None else mask * tool_mask
