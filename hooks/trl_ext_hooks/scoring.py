# mypy: disable-error-code="empty-body"
"""Rewards and advantages: a scored round, and the hooks that turn rewards into what the loss uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .basics import Metric, loss_mask
from .plugin import UsageError, hookspec
from .rollout import Rollout

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rewards:
    """Holds rewards (N, F') with their names and weights, where a plugin adds, drops or renames columns.

    A plugin whose names differ from those it got implements the hook `reward_columns`.
    """

    values: torch.Tensor
    names: tuple[str, ...]
    weights: torch.Tensor


@dataclass(frozen=True)
class Scored(Rollout):
    """Holds a scored round.

    Attributes:
        fields: What `annotate` of any plugin returned, by name: b local values.
        gathered: The tensors among them, of all processes: (N, ...).
        rewards: (N, F) float32 of all processes. NaN = this reward does not apply to the row. The core refuses infinite
            rewards and names the reward function.
        reward_names: The F names, each of them once: where two functions are called `match`, the second is `match_2`.
        reward_weights: (F,).
    """

    fields: Mapping[str, Any]
    gathered: Mapping[str, torch.Tensor]
    rewards: torch.Tensor
    reward_names: tuple[str, ...]
    reward_weights: torch.Tensor

    @property
    def columns(self) -> dict[str, list[Any]]:
        """Returns the values by column name, as in `Rollout`, with those that `annotate` of any plugin added."""
        return super().columns | {name: list(values) for name, values in self.fields.items()}

    def reward_index(self, name: str | None = None) -> int:
        """Returns the column of a reward. Without a name that is the first one.

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
        """Returns the rewards of one reward function, without a name of the first: (N,), NaN = does not apply."""
        return self.rewards[:, self.reward_index(name)]

    @property
    def total_reward(self) -> torch.Tensor:
        """Sums each row's rewards that apply, with their weights: (N,) float64, NaN where none applies."""
        total = (self.rewards.double() * self.reward_weights.double()).nansum(dim=1)
        return total.masked_fill(self.rewards.isnan().all(dim=1), float("nan"))


@dataclass(frozen=True)
class Round(Scored):
    """Holds a round with advantages.

    Attributes:
        advantages: What the loss would use now: (N,) one per row of all processes, or (b, T) one per local token.
        batch: The tensors that go to the loss, by TRL's names, b rows, still in group order: `prompt_ids` and
            `prompt_mask` (b, P), `completion_ids` and `completion_mask` (b, T). Where they exist also `tool_mask`,
            `old_per_token_logps`, `old_entropies` and `ref_per_token_logps` (b, T).
        hidden_states: By plugin, the hidden states that it named in `hidden_positions`, under the policy that sampled
            the round: (n, H), detached.
        gathered_lengths: What `lengths` returns, where it is known already.
    """

    advantages: torch.Tensor
    batch: Mapping[str, Any]
    hidden_states: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gathered_lengths: torch.Tensor | None = field(default=None, kw_only=True)

    @property
    def lengths(self) -> torch.Tensor:
        """Counts the tokens of each row that the loss counts, of all processes: (N,).

        The core gathers the counts once for every round, so reading them is not collective. Only a round that was made
        by hand gathers them here.
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
        """Marks the tokens that the loss counts with 1, others with 0: (b, T)."""
        return loss_mask(self.batch)

    @property
    def kept(self) -> torch.Tensor:
        """Marks the rows of this process that `keep_rows` and `token_mask` left in: (b,) booleans, at first all."""
        kept: torch.Tensor | None = self.batch.get("trl_ext_kept")
        return self.group_ids[self.local] >= 0 if kept is None else kept

    @property
    def old_entropies(self) -> torch.Tensor:
        """Returns the entropy of the sampling policy before each token: (b, T), 0 on padding.

        Raises:
            AttributeError: No plugin of the run has the need `old_entropies`.
        """
        entropies: torch.Tensor | None = self.batch.get("old_entropies")
        if entropies is None:
            raise AttributeError("no plugin of this run needs `old_entropies`; declare the need")
        return entropies

    @property
    def token_advantages(self) -> torch.Tensor:
        """Returns this process's advantages, one per token: (b, T), 0 on tokens that the loss does not count."""
        rows = self.advantages if self.advantages.dim() == 2 else self.advantages[self.local].unsqueeze(1)
        return rows * self.loss_mask


@hookspec
def reward_columns(names: tuple[str, ...]) -> Sequence[str] | None:
    """Names the reward columns that the plugin's hook `rewards` returns, where it adds, drops or renames some. Chained.

    Runs on every process, before `configure`, in the order of the plugins. `names` holds the columns that the plugin's
    hook `rewards` will get. Options of the type `RewardName`, needs such as `"reward:NAME"` and
    `Config.reward_names` of all plugins are checked against the names behind the last plugin. A plugin with the hook
    `rewards` may also name columns that it gets. None keeps the names. GRPO and RLOO.

    ```python
    class MeanOfAll(Plugin):
        name = "mean-of-all"
        trainers = ("grpo", "rloo")

        @hookimpl
        def reward_columns(self, names):
            return ("mean",)

        @hookimpl
        def rewards(self, scored):
            mean = scored.rewards.nanmean(dim=1, keepdim=True)  # (N, 1)
            return Rewards(mean, ("mean",), torch.ones(1))
    ```
    """


@hookspec
def rewards(scored: Scored) -> Rewards | torch.Tensor | None:
    """Rewrites the rewards of all processes, before any statistic and before they are logged. Chained.

    Runs on every process, in the order in which the user named the plugins. Returns (N, F) values, or `Rewards` with
    other weights, or with the columns that `reward_columns` of this plugin announced. NaN = does not apply. Every
    process must return the same values, which the core checks. None keeps the rewards. GRPO and RLOO. Collective.

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
    """Computes or adjusts the advantages of a round. The estimator comes first, then the others in order. Chained.

    Runs on every process. A plugin that claims `estimator` computes advantages from `round.rewards`. The others start
    from `round.advantages`. Returns (N,) for all processes, equal on each, or (b, T) for this process's tokens (GRPO
    only). Every value must be finite. None keeps the advantages. GRPO and RLOO. Collective.

    `keep_rows` and `token_mask` have not run yet. What counts the tokens or rows that the loss averages belongs in
    `token_weights`.

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
def mix_advantages(round: Round, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Combines the advantages of all estimators of the run and of TRL. At most one plugin of a run has this hook.

    Runs on every process, after the estimators and before the plugins that adjust advantages. Beside a plugin with this
    hook any number of plugins may claim `estimator`. Each of them starts from the round as TRL left it, so none sees
    what another one made.

    `round.advantages` are TRL's. `parts` holds the advantages by plugin name, and TRL's own as `trl`. All of them are
    (N,) for the rows of all processes. Where one is per token, all are (b, T) for this process's tokens. Returns
    advantages of the same shape. Every value must be finite. None keeps TRL's. GRPO and RLOO. Collective.

    ```python
    class GradualStart(Plugin):
        name = "gradual-start"
        trainers = ("grpo", "rloo")

        @hookimpl
        def mix_advantages(self, round, parts):
            share = min(1.0, round.step / 100)  # from TRL's advantages to the mean of the others
            others = [values for name, values in parts.items() if name != "trl"] or [parts["trl"]]
            return (1 - share) * parts["trl"] + share * sum(others) / len(others)
    ```
    """


@hookspec
def keep_rows(round: Round) -> torch.Tensor | None:
    """Selects the rows that a training round learns from. A row stays if every plugin with this hook keeps it.

    Runs on every process, after `advantages`, so group statistics include all rows. Returns (N,) booleans for the rows
    of all processes, equal on each. None keeps all rows. GRPO and RLOO, training rounds only. Collective.

    A row left out counts as if it had never been sampled. Its advantage and its loss mask are 0, and no denominator of
    the loss counts it:

    - The loss types dapo, cispo and vespo divide by `num_items_in_batch`, which is counted again.
    - The loss types grpo, sapo, dr_grpo and luspo, and RLOO, average over rows. They are scaled by N / kept rows.
    - The loss type bnpo averages inside micro-batches. Each micro-batch then weighs as many rows as it keeps.

    Values per token from `loss_terms` follow the same rule. A scalar is averaged by the plugin that returns it, and
    `loss.mask` is 0 on rows left out. A plugin whose `policy_loss` is a scalar has to leave these rows out itself. It
    declares that with `honours = ("keep_rows",)`, or returns a `"share"` of a mean over the round. Later hooks of the
    round find the rows in `round.kept`.

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
def token_mask(round: Round) -> torch.Tensor | None:
    """Selects the tokens that a training round learns from. A token stays if every plugin with this hook keeps it.

    Runs on every process, after `keep_rows`, so `round.loss_mask` is 0 on rows that are left out. Returns (b, T)
    booleans for this process's tokens. Values where `round.loss_mask` is 0 do not matter. None keeps all tokens. GRPO,
    training rounds only. Collective.

    A token left out counts as if a tool had written it: the policy reads it and does not learn from it. `loss.mask`,
    `round.loss_mask` and `round.lengths` are 0 there or do not count it, for every plugin. So all that averages tokens
    averages the kept ones:

    - The loss types dapo, cispo, vespo and bnpo divide by kept tokens, and grpo and sapo by those of each row. luspo
      adds up the kept tokens of a row. dr_grpo divides by its constant, which counts no tokens.
    - The entropy bonus, the ratio of a sequence, and the quantile of `top_entropy_quantile` see kept tokens only.
    - So do the metrics `entropy`, `kl` and `clip_ratio`. Lengths and `num_tokens` still count what was sampled.

    A row of which no token is left counts as left out by `keep_rows`: its advantage is 0, no denominator counts it, and
    `round.kept` says so. For a `policy_loss` that is a scalar, the same holds as with `keep_rows`.

    ```python
    class SurprisingHalf(Plugin):
        name = "surprising-half"
        trainers = ("grpo",)
        needs = ("old_entropies",)

        @hookimpl
        def token_mask(self, round):
            entropies, counted = round.old_entropies, round.loss_mask != 0
            return entropies >= entropies[counted].median()
    ```
    """


@hookspec
def token_weights(round: Round) -> torch.Tensor | None:
    """Weighs the tokens of a round: the core multiplies the advantages by the weights. All plugins, in order.

    Runs on every process, after `token_mask`, so counts of `round.loss_mask` and `num_items_in_batch` are those that
    the loss divides by. Returns (b, T) finite numbers for this process's tokens. None weighs nothing. Declare the need
    `token_advantages`. A plugin with this hook is refused beside another one that replaces the policy loss, because
    weights rest on the averages of TRL's loss. GRPO. Collective.

    ```python
    class FirstTokenCounts(Plugin):
        name = "first-token-counts"
        trainers = ("grpo",)
        needs = ("token_advantages",)

        @hookimpl
        def token_weights(self, round):
            first = (round.loss_mask.cumsum(1) == 1) & (round.loss_mask != 0)
            share = round.trainer.gather(first.sum()).sum() / round.lengths.sum().clamp(min=1)
            return torch.where(first, 0.5 / share.clamp(min=1e-9), 1.0)  # first tokens have half the loss
    ```
    """


@hookspec
def batch_fields(round: Round) -> Mapping[str, torch.Tensor] | None:
    """Adds tensors (b, ...) that travel with their rows through shuffling and splitting to the loss. All plugins.

    Runs on every process, after `keep_rows`, `token_mask` and `token_weights`. The plugin declares the names in
    `fields`. A 0-d tensor reaches every micro-batch unchanged. The loss finds the tensors in `loss.batch`, detached.
    None adds nothing. GRPO and RLOO. Collective.

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
    """Reports values of a finished round as {name: (sum, count)}. All plugins.

    Runs on every process, after `batch_fields`. The core adds sums and counts over processes, and reports the ratio as
    `<plugin>/<name>`. A hook that computes such a value on its way calls `round.log` instead. None reports nothing.
    GRPO and RLOO. Collective.

    ```python
    class ZeroShare(Plugin):
        name = "zero-share"
        trainers = ("grpo", "rloo")

        @hookimpl
        def round_metrics(self, round):
            return {"zero": ((round.advantages == 0).sum().item(), round.advantages.numel())}
    ```
    """
