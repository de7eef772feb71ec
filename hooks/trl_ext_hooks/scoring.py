# mypy: disable-error-code="empty-body"
"""Rewards and advantages: a scored round, and the hooks that turn rewards into what the loss uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .basics import Metric, loss_mask
from .plugin import UsageError, hookspec
from .rollout import Rollout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rewards:
    """Rewards (N, F') with their names and weights, where a plugin adds or removes columns."""

    values: torch.Tensor
    names: tuple[str, ...]
    weights: torch.Tensor


@dataclass(frozen=True)
class Scored(Rollout):
    """A scored round.

    Attributes:
        fields: What `annotate` of any plugin returned, by name: b local values.
        gathered: The tensors among them, of all processes: (N, ...).
        rewards: (N, F) float32 of all processes; NaN = this reward does not apply to the row.
        reward_names: The F names.
        reward_weights: (F,).
    """

    fields: Mapping[str, Any]
    gathered: Mapping[str, torch.Tensor]
    rewards: torch.Tensor
    reward_names: tuple[str, ...]
    reward_weights: torch.Tensor

    def reward_index(self, name: str | None = None) -> int:
        """Returns the column of a reward: the first one without a name.

        Raises:
            UsageError: The round has no reward of that name.
        """
        if not name:
            return 0
        if name not in self.reward_names:
            raise UsageError(
                f"no reward is called {name!r} here; the round has {', '.join(self.reward_names)}. A plugin that acts "
                f"earlier may have removed or renamed it: correct the option, or the order of the plugins."
            )
        return self.reward_names.index(name)

    def reward(self, name: str | None = None) -> torch.Tensor:
        """Returns the (N,) rewards of one reward function: of the first one without a name. NaN = does not apply."""
        return self.rewards[:, self.reward_index(name)]

    @property
    def total_reward(self) -> torch.Tensor:
        """(N,) float64: the weighted sum of each row's rewards that apply; NaN where none does."""
        total = (self.rewards.double() * self.reward_weights.double()).nansum(dim=1)
        return total.masked_fill(self.rewards.isnan().all(dim=1), float("nan"))


@dataclass(frozen=True)
class Round(Scored):
    """A round with advantages.

    Attributes:
        advantages: What the loss would use now: (N,) one per row of all processes, or (b, T) one per local token.
        batch: The tensors that go to the loss, by TRL's names, b rows, still in group order: `prompt_ids` (b, P),
            `completion_ids`, `completion_mask` (b, T), and where they exist `tool_mask`, `old_per_token_logps`,
            `ref_per_token_logps`.
        hidden_states: By plugin, (n, H) detached: the hidden states that it named in `hidden_positions`, under the
            policy that sampled the round.
        gathered_lengths: What `lengths` returns, where it is known already.
    """

    advantages: torch.Tensor
    batch: Mapping[str, Any]
    hidden_states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gathered_lengths: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def lengths(self) -> torch.Tensor:
        """(N,): how many tokens of each row the loss counts, of all processes.

        The core gathers them once for every round, so reading them is no collective. Only a round that was made by hand
        gathers them here.
        """
        if self.gathered_lengths is None:
            return self.trainer.gather(self.loss_mask.sum(dim=1))
        return self.gathered_lengths

    @property
    def micro_batches(self) -> int:
        """Into how many micro-batches the round is divided, on all processes together.

        A loss whose micro-batches add up to a mean over the round divides their sums by an average micro-batch: by what
        the round holds / `micro_batches`.
        """
        per_process = self.trainer.args.steps_per_generation if self.mode == "train" else 1
        return int(self.trainer.num_processes * per_process)

    @property
    def loss_mask(self) -> torch.Tensor:
        """(b, T): 1 on the tokens that the loss counts."""
        return loss_mask(self.batch)

    @property
    def kept(self) -> torch.Tensor:
        """(b,) booleans: the rows of this process that `keep_rows` left in; all of them before it has run."""
        kept: torch.Tensor | None = self.batch.get("trl_ext_kept")
        return self.group_ids[self.local] >= 0 if kept is None else kept

    @property
    def token_advantages(self) -> torch.Tensor:
        """(b, T): the advantages of this process, one per token, 0 on tokens that the loss does not count."""
        rows = self.advantages if self.advantages.dim() == 2 else self.advantages[self.local].unsqueeze(1)
        return rows * self.loss_mask


@hookspec
def rewards(scored: Scored) -> Rewards | torch.Tensor | None:
    """Rewrites the rewards of all processes, before any statistic and before they are logged. Chained.

    Returns (N, F) values, or `Rewards` to add, drop or rename columns. NaN means "does not apply". Every process must
    return the same values.

    ```python
    class ClipRewards(Plugin):
        name = "clip-rewards"
        trainers = ("grpo", "rloo")

        @hookimpl
        def rewards(self, scored):
            return scored.rewards.clamp(-1, 1)
    ```
    """


@hookspec
def advantages(round: Round) -> torch.Tensor | None:
    """Computes or adjusts the advantages of a round. One estimator first, then the other plugins in order. Collective.

    A plugin that claims `estimator` computes them from `round.rewards`; the others start from `round.advantages`.
    Returns (N,) for all processes, equal on each, or (b, T) for this process's tokens (GRPO only). Both must be finite.

    ```python
    class MeanOnly(Plugin):
        name = "mean-only"
        trainers = ("grpo",)
        claims = ("estimator",)

        @hookimpl
        def advantages(self, round):
            return ops.group_normalize(round.total_reward, round.group_ids, scale=False).nan_to_num(nan=0.0)
    ```
    """


@hookspec
def keep_rows(round: Round) -> torch.Tensor | None:
    """Selects the rows that a training round learns from. All plugins; each must keep a row for it to stay. Collective.

    Returns (N,) booleans for the rows of all processes, equal on each. The others become as if they had never been
    sampled: their advantage and loss mask are 0, and no denominator of the loss counts them. `num_items_in_batch`
    (loss types dapo, cispo, vespo) is counted again; where the loss averages over rows (grpo, sapo, dr_grpo, luspo,
    RLOO) it is scaled by N / kept; in bnpo, which averages inside micro-batches, each micro-batch weighs as many rows
    as it keeps. So are terms per token of `loss_terms`; scalar terms are averaged as plugins do it, `loss.mask` is 0 on
    the rows left out. A `policy_loss` that is a scalar has to leave them out itself and to say so:
    `honours = ("keep_rows",)`. Later hooks of the round see what is left in `round.kept`.

    Advantages and group statistics are computed before, with all rows. Training rounds only. GRPO and RLOO.

    ```python
    class SkipSilentGroups(Plugin):
        name = "skip-silent-groups"
        trainers = ("grpo", "rloo")

        @hookimpl
        def keep_rows(self, round):
            return ~ops.group_stats(round.total_reward, round.group_ids).constant
    ```
    """


@hookspec
def batch_fields(round: Round) -> Mapping[str, torch.Tensor] | None:
    """Adds tensors (b, ...) that travel with their rows through shuffling and splitting to the loss. All plugins.

    Names must be declared in `fields`. A 0-d tensor reaches every micro-batch unchanged. Collective. GRPO and RLOO.

    ```python
    class CarryLengths(Plugin):
        name = "carry-lengths"
        trainers = ("grpo", "rloo")
        fields = ("completion_lengths",)

        @hookimpl
        def batch_fields(self, round):
            return {"completion_lengths": round.loss_mask.sum(1)}
    ```
    """


@hookspec
def round_metrics(round: Round) -> Mapping[str, Metric] | None:
    """Reports values of a finished round as {name: (sum, count)}. All plugins. Collective. GRPO and RLOO.

    The core adds sums and counts over processes, and reports the ratio as `<plugin>/<name>`. A hook that computes such
    a value on its way reports it by `round.log` instead, which needs no hook of its own.

    ```python
    class ZeroShare(Plugin):
        name = "zero-share"
        trainers = ("grpo", "rloo")

        @hookimpl
        def round_metrics(self, round):
            return {"zero": ((round.advantages == 0).sum().item(), round.advantages.numel())}
    ```
    """
