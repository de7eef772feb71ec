"""GDPO: group reward-decoupled normalisation (arXiv 2601.05242).

GRPO adds several rewards and then normalises the sum inside the group, so different reward combinations get the same
advantage and the reward with the largest spread drowns the others. GDPO normalises every reward inside the group on its
own, adds the weighted results, and rescales once over the whole batch.

Stages: rewards (conditioning only), advantages. Against the authors' TRL fork: entries that are NaN ("does not apply")
are left out of the statistics instead of counting as 0 (`nan_policy="zero"` restores that), and groups without signal
give exactly 0, where float32 rounding can otherwise be whitened into advantages of 2.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import Config, Plugin, Refuse, Requirement, Round, Scored, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_normalize, group_stats


@dataclass(frozen=True)
class Condition:
    """`target` counts only where `given` reaches `threshold` (equation 8)."""

    target: str = option(help="name of the reward function whose reward becomes 0")
    given: str = option(help="name of the reward function that decides")  # `on` would be read as true in YAML
    threshold: float = option(1.0, help="least reward of `given` at which `target` counts", source="paper, eq. 8")


@dataclass(frozen=True)
class GDPOOptions:
    """Options of GDPO. Weights are the trainer's `reward_weights`; they multiply the normalised rewards."""

    group_eps: float = option(1e-4, help="added to a group's standard deviation", source="authors' TRL fork, TRL 1.16")
    batch_eps: float = option(
        1e-4, help="added to the batch's standard deviation", source="authors' TRL fork, TRL 1.16"
    )
    batch_norm: bool = option(True, help="rescale over the batch at the end", source="paper, eq. 6")
    whiten: Literal["sequence", "token"] = option(
        "sequence",
        help="unit of the batch statistics: rows, or tokens so that long rows weigh more",
        source="paper, eq. 6",
    )
    conditions: tuple[Condition, ...] = option(
        (), help="rewards that count only where another is reached: {target, given, threshold}", source="paper, eq. 8"
    )
    nan_policy: Literal["exclude", "zero"] = option(
        "exclude", help="leave NaN rewards out of the statistics, or count them as 0", source="TRL 1.16; authors: zero"
    )
    zero_std_tol: float = option(1e-6, help="relative range up to which a group is constant", source="ours")

    def __post_init__(self) -> None:
        if self.group_eps <= 0 or self.batch_eps <= 0:
            raise ValueError("group_eps and batch_eps must be greater than 0")


def condition_rewards(rewards: torch.Tensor, target: int, on: int, threshold: float) -> torch.Tensor:
    """Equation 8: reward `target` becomes 0 on the rows where reward `on` is below the threshold or NaN.

    Args:
        rewards: (N, K).

    Returns:
        (N, K), a copy. A NaN target stays NaN.
    """
    out = rewards.clone()
    missed = ~(rewards[:, on] >= threshold) & ~torch.isnan(rewards[:, target])
    out[missed, target] = 0.0
    return out


def decoupled_sum(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-4, tol: float = 1e-6
) -> torch.Tensor:
    """Equations 4, 5 and 7: S[n] = sum_k w[k] * (R[n,k] - mean_group[k]) / (std_group[k] + eps), std with ddof 1.

    Args:
        rewards: (N, K); NaN entries are left out of the statistics and add 0.
        weights: (K,).
        group_ids: (N,).

    Returns:
        (N,) float64; NaN where all K rewards are NaN. Constant groups add exactly 0.
    """
    normalised = group_normalize(rewards.double(), group_ids, eps=eps, ddof=1, tol=tol)  # (N, K)
    total = (normalised * weights.double()).nansum(dim=1)
    return torch.where(torch.isnan(rewards).all(dim=1), torch.nan, total)


def whiten(values: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """Equation 6: (S - mean) / (std + eps) over all rows, std with ddof 1; NaN rows are left out and give 0.

    Args:
        values: (N,).

    Returns:
        (N,); all 0 when fewer than two rows are valid.
    """
    valid = ~torch.isnan(values)
    if int(valid.sum()) < 2:
        return torch.zeros_like(values)
    kept = values[valid]
    return torch.where(valid, (values - kept.mean()) / (kept.std() + eps), 0.0)


def whiten_tokens(values: torch.Tensor, lengths: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """The authors' verl form of equation 6: statistics over tokens, (S - mean) * rsqrt(var + eps), unbiased variance.

    Args:
        values: (N,) one per row, NaN rows are left out and give 0.
        lengths: (N,) tokens of each row that the loss counts.

    Returns:
        (N,), to be repeated on each row's tokens; all 0 when fewer than two tokens are counted.
    """
    weight = torch.where(torch.isnan(values), 0.0, lengths.to(values.dtype))
    total = weight.sum()
    if total < 2:
        return torch.zeros_like(values)
    filled = torch.nan_to_num(values)
    mean = (filled * weight).sum() / total
    variance = ((filled - mean) ** 2 * weight).sum() / (total - 1)
    return torch.where(weight > 0, (filled - mean) * torch.rsqrt(variance + eps), 0.0)


def gdpo_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    group_eps: float = 1e-4,
    batch_eps: float = 1e-4,
    batch_norm: bool = True,
    nan_policy: Literal["exclude", "zero"] = "exclude",
    tol: float = 1e-6,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Equations 4 to 7. With `lengths`, the batch statistics are taken over tokens.

    Args:
        rewards: (N, K) after conditioning; NaN = does not apply.
        weights: (K,), they multiply normalised rewards.
        group_ids: (N,).
        lengths: (N,) token counts for `whiten_tokens`, or None.

    Returns:
        (N,) in the dtype of `rewards`. Rows whose rewards are all NaN get 0, as does a batch without any signal.
    """
    used = torch.nan_to_num(rewards) if nan_policy == "zero" else rewards
    total = decoupled_sum(used, weights, group_ids, eps=group_eps, tol=tol)
    if not batch_norm:
        out = torch.nan_to_num(total)
    elif lengths is None:
        # a group's S adds up to 0, so the batch mean is rounding, which must not give silent rows an advantage
        out = torch.where(total == 0, 0.0, whiten(total, eps=batch_eps))
    else:
        out = whiten_tokens(total, lengths)
    return out.to(rewards.dtype)


class GDPO(Plugin):
    """GDPO for GRPOTrainer. RLOO has no normalisation inside the group and is refused."""

    name = "gdpo"
    paper = "arXiv 2601.05242"
    summary = "normalises every reward inside its group before adding them, then rescales over the batch"
    trainers = ("grpo",)
    Options = GDPOOptions
    claims = ("estimator",)

    options: GDPOOptions

    @hookimpl
    def configure(self, config: Config) -> Sequence[Requirement]:
        found: list[Requirement] = []
        if config.reward_names is not None and len(config.reward_names) == 1:
            found.append(Warn("one reward function leaves nothing to decouple; advantages stay those of plain GRPO"))
        for condition in self.options.conditions:
            for name in (condition.target, condition.given):
                if config.reward_names and name not in config.reward_names:
                    what = f"a condition names the reward {name!r}, and the run has {', '.join(config.reward_names)}."
                    found.append(Refuse(what, "Correct gdpo.conditions."))
        weights = config.args.reward_weights
        if weights is not None and not any(weights):
            found.append(Refuse("all reward_weights are 0.", "Give at least one reward a weight."))
        return found

    @hookimpl
    def rewards(self, scored: Scored) -> torch.Tensor | None:
        if not self.options.conditions:
            return None
        values = scored.rewards
        for condition in self.options.conditions:
            target, on = (scored.reward_names.index(name) for name in (condition.target, condition.given))
            values = condition_rewards(values, target, on, condition.threshold)
        return values

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor | None:
        if round.rewards.shape[1] == 1:
            return None
        lengths = round.trainer.gather(round.loss_mask.sum(dim=1)) if self.options.whiten == "token" else None
        return gdpo_advantages(
            round.rewards,
            round.reward_weights,
            round.group_ids,
            group_eps=self.options.group_eps,
            batch_eps=self.options.batch_eps,
            batch_norm=self.options.batch_norm,
            nan_policy=self.options.nan_policy,
            tol=self.options.zero_std_tol,
            lengths=lengths,
        )

    @hookimpl
    def round_metrics(self, round: Round) -> dict[str, tuple[float, float]]:
        """Per reward, the share of rows whose group gives it no signal."""
        constant = group_stats(round.rewards, round.group_ids, tol=self.options.zero_std_tol).constant
        shares = constant.double().sum(dim=0).tolist()
        names = round.reward_names
        return {f"zero_std/{name}": (share, len(constant)) for name, share in zip(names, shares, strict=True)}
