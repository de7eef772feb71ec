# mypy: disable-error-code="empty-body"
"""Side rows: rows of a plugin that the policy scores beside those of the round, and the hook that supplies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .basics import Mode
from .plugin import hookspec
from .trainer import TrainerView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SideBatch:
    """Holds rows of a plugin's own, which the policy scores beside those of the round.

    Attributes:
        prompt_ids: Token ids of each of the k prompts, unpadded. k may be 0, and may differ between processes. Where a
            process has no row and another one has, the loss finds the same `fields` there, with 0 rows.
        completion_ids: Token ids of each completion, unpadded. Prompts and completions have at least one token.
        fields: Further tensors (k, ...), such as log-probabilities that were stored with the rows. Values per token are
            (k, T), padded right, where T is the length of the longest completion.
    """

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]
    fields: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class SideRows:
    """Holds the rows of a `SideBatch` that belong to one micro-batch, scored by the policy.

    The core deals the k rows of a process to the micro-batches of the optimizer step in order. A micro-batch without a
    row has n = 0, and both means are then 0.

    Attributes:
        completion_ids: (n, T), padded right.
        mask: (n, T), 1 on the tokens of the completions.
        per_token_logps: (n, T) with gradient, 0 where `mask` is 0.
        entropies: (n, T).
        fields: The plugin's own tensors of these rows: (n, ...).
        rows: Rows of the plugin in this optimizer step, on all processes.
        tokens: Tokens of their completions.
        micro_batches: Micro-batches of this optimizer step, on all processes together.
    """

    completion_ids: torch.Tensor
    mask: torch.Tensor
    per_token_logps: torch.Tensor
    entropies: torch.Tensor
    fields: Mapping[str, torch.Tensor]
    rows: int
    tokens: int
    micro_batches: int

    def token_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Returns a 0-d term whose mean over the micro-batches of the step is the mean of (n, T) values over tokens.

        All tokens of the step on all processes have the same weight, however the rows were dealt.
        """
        return (values * self.mask).sum() * (self.micro_batches / max(self.tokens, 1))

    def row_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Returns a 0-d term whose mean over the micro-batches of the step is the mean of (n,) values over rows."""
        return values.sum() * (self.micro_batches / max(self.rows, 1))


@hookspec
def side_batch(trainer: TrainerView, mode: Mode, step: int) -> SideBatch | None:
    """Supplies rows of the plugin's own, whose log-probabilities arrive with the loss. All plugins.

    Runs on every process, once per optimizer step before its first loss, and once per batch of an evaluation. Each
    process gives rows of its own, so a plugin deals a common store by `trainer.process_index`. The core deals them to
    the micro-batches of the step. `loss.side[name of the plugin]` holds those of a micro-batch as `SideRows`, scored by
    the policy with gradient, through the owner of the forward. None supplies no row for this process.

    All rows of a micro-batch go through one forward of their own, on every process or on none, so memory grows with
    them. Their loss is a term that the plugin returns. `SideRows.token_mean` gives every token of the step the same
    weight. GRPO and RLOO. Collective.

    ```python
    class Rehearse(Plugin):
        name = "rehearse"
        trainers = ("grpo", "rloo")

        @hookimpl
        def side_batch(self, trainer):
            known = [trainer.tokenizer(f"{i}+{i}={2 * i}")["input_ids"] for i in range(4)]
            mine = known[trainer.process_index :: trainer.num_processes]
            return SideBatch([ids[:-1] for ids in mine], [ids[-1:] for ids in mine])

        @hookimpl
        def loss_terms(self, loss):
            side = loss.side[self.name]
            return {"rehearsal": 0.1 * side.token_mean(-side.per_token_logps)}
    ```
    """
