# mypy: disable-error-code="empty-body"
"""Preference pairs: the micro-batches of DPO, and the hooks that act on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .basics import Logs, Metric, Mode
from .plugin import hookspec
from .trainer import TrainerView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Pairs(Logs):
    """Holds a micro-batch of n preference pairs of DPO, before its forwards. L is the padded length with the prompt.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        batch: Tensors by TRL's names: `input_ids`, `attention_mask` and `completion_mask` (2n, L), and what else the
            collator made. Rows are padded right, and the first n are the chosen ones.
        rows: n dataset rows with the columns that plugins need. Where the data are text, also `prompt_ids`,
            `chosen_ids` and `rejected_ids`.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    batch: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def mask(self) -> torch.Tensor:
        """Marks the tokens that the loss counts: (2n, L-1) bool. Entry t is about token t + 1."""
        mask: torch.Tensor = self.batch["completion_mask"]
        return mask[:, 1:] != 0


@dataclass(frozen=True)
class ScoredPairs(Pairs):
    """Holds pairs with their log-probabilities.

    Attributes:
        fields: What `pair_batch` of any plugin returned, by name.
        per_token_logps: (2n, L-1) under the policy, 0 where `mask` is false. With gradient in `pair_logps`.
        ref_per_token_logps: (2n, L-1) under the reference. None in `pair_metrics` where only precomputed sums exist.
    """

    fields: Mapping[str, Any]
    per_token_logps: torch.Tensor
    ref_per_token_logps: torch.Tensor | None

    @property
    def sequence_log_ratios(self) -> torch.Tensor:
        """(2n,): log-probability of each completion under the policy - that under the reference, summed over tokens."""
        if self.ref_per_token_logps is not None:
            return (self.per_token_logps - self.ref_per_token_logps).sum(dim=1)
        ratios, pairs = self.per_token_logps.sum(dim=1), len(self.rows)
        ratios[:pairs] -= self.batch["ref_chosen_logps"]  # `precompute_ref_log_probs` keeps sums only
        ratios[pairs:] -= self.batch["ref_rejected_logps"]
        return ratios


@dataclass(frozen=True)
class PairLogps:
    """Holds rewritten log-probabilities of policy and reference, (2n, L-1) each."""

    per_token_logps: torch.Tensor
    ref_per_token_logps: torch.Tensor


@hookspec
def pair_batch(pairs: Pairs) -> Mapping[str, Any] | None:
    """Adds fields to a micro-batch of pairs, before its forwards. All plugins.

    Runs in every training process, also where worker processes load the data. The plugin declares the names in
    `fields`. `pair_logps` and `pair_metrics` find the values in `pairs.fields`. The model never sees them. None adds
    nothing. DPO.

    `pairs.rows` holds the columns that plugins need (`column:NAME`), also those that TRL drops, in training and in
    evaluation. `trl_ext_hooks.toolkit.tokens.align_tokens` lays out one value per completion token like the
    log-probabilities.

    ```python
    class Confidence(Plugin):
        name = "confidence"
        trainers = ("dpo",)
        needs = ("column:difficulty",)
        fields = ("confidence",)

        @hookimpl
        def pair_batch(self, pairs):
            hard = torch.tensor([float(row["difficulty"]) for row in pairs.rows], device=pairs.trainer.device)
            return {"confidence": 1 / (1 + hard)}

        @hookimpl
        def pair_logps(self, pairs):
            weight = pairs.fields["confidence"].repeat(2).unsqueeze(1)  # (2n, 1): the rejected rows follow the chosen
            return PairLogps(weight * pairs.per_token_logps, weight * pairs.ref_per_token_logps)
    ```
    """


@hookspec
def pair_logps(pairs: ScoredPairs) -> PairLogps | None:
    """Rewrites the log-probabilities of policy and reference, token by token. Chained.

    Runs on every process. The policy's values must keep their gradient. TRL computes its loss and its metrics from the
    result, so `rewards/*` and `logps/*` describe rewritten values. The hook is refused with `precompute_ref_log_probs`,
    which keeps sums only. None keeps the values. DPO from TRL 1.15.

    ```python
    class FirstTokens(Plugin):
        name = "first-tokens"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs):
            early = pairs.mask.cumsum(1) <= 4
            return PairLogps(pairs.per_token_logps * early, pairs.ref_per_token_logps * early)
    ```
    """


@hookspec
def pair_metrics(pairs: ScoredPairs) -> Mapping[str, Metric] | None:
    """Reports values of a micro-batch of pairs as {name: (sum, count)}. All plugins.

    Runs on every process, after the loss. The log-probabilities are those of the models, detached, before any
    `pair_logps`. A hook that computes such a value on its way calls `pairs.log` instead. None reports nothing. DPO from
    TRL 1.15. Collective.

    ```python
    class TokenMargin(Plugin):
        name = "token-margin"
        trainers = ("dpo",)

        @hookimpl
        def pair_metrics(self, pairs):
            chosen, rejected = (pairs.per_token_logps * pairs.mask).sum(1).chunk(2)
            return {"margin": ((chosen - rejected).sum().item(), len(chosen))}
    ```
    """
