# mypy: disable-error-code="empty-body"
"""Preference pairs of DPO, and the hooks that act on them."""

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
    """A micro-batch of n preference pairs of DPO, before its forwards. L is the padded length, prompt included.

    Attributes:
        mode, step, trainer: As in `Rollout`.
        batch: Tensors by TRL's names, 2n rows of which the first n are the chosen ones, padded right: `input_ids`,
            `attention_mask`, `completion_mask` (2n, L), and what else the collator made.
        rows: n dataset rows with the columns that plugins need, and where the data are text `prompt_ids`,
            `chosen_ids`, `rejected_ids`.
    """

    mode: Mode
    step: int
    trainer: TrainerView
    batch: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def mask(self) -> torch.Tensor:
        """(2n, L-1) bool: the tokens that the loss counts; entry t is about token t + 1."""
        mask: torch.Tensor = self.batch["completion_mask"]
        return mask[:, 1:] != 0


@dataclass(frozen=True)
class ScoredPairs(Pairs):
    """Pairs with their log-probabilities.

    Attributes:
        fields: What `pair_batch` of any plugin returned.
        per_token_logps: (2n, L-1) under the policy, 0 where `mask` is false; with gradient in `pair_logps`.
        ref_per_token_logps: (2n, L-1) under the reference; None where only precomputed sums exist, which happens in
            `pair_metrics` only.
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
    """Rewritten log-probabilities of policy and reference, (2n, L-1) each."""

    per_token_logps: torch.Tensor
    ref_per_token_logps: torch.Tensor


@hookspec
def pair_batch(pairs: Pairs) -> Mapping[str, Any] | None:
    """Adds fields to a micro-batch of pairs, before its forwards. All plugins. DPO.

    Names must be declared in `fields`; `pair_logps` and `pair_metrics` find the values in `pairs.fields`, and the model
    never sees them. The columns that `needs` names (`column:NAME`) are in `pairs.rows`, whatever TRL drops, in training
    and in evaluation. Runs in the training process, also where worker processes load the data.
    `trl_ext_hooks.toolkit.tokens.align_tokens` lays one value per completion token out like the log-probabilities.

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
    """Rewrites the log-probabilities of policy and reference, token by token. Chained. DPO from TRL 1.15.

    TRL then forms what it forms of every loss, divergence and metric from the result, so its `rewards/*` and `logps/*`
    are about rewritten values. The policy's must keep their gradient. Refused with `precompute_ref_log_probs`, which
    keeps sums only.

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
    """Reports values of a micro-batch of pairs as {name: (sum, count)}. All plugins. Collective. DPO from TRL 1.15.

    The log-probabilities are those of the models, detached, before any `pair_logps`. Other hooks of pairs may use
    `pairs.log`.

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
