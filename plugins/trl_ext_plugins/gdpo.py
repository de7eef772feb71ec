"""GDPO: group reward-decoupled normalisation (arXiv 2601.05242).

GRPO normalises the sum of all rewards inside the group, where the reward with the largest spread drowns the others.
GDPO normalises every reward on its own, adds the weighted results, and rescales the sum over the batch. Unlike in the
authors' TRL fork, NaN rewards ("does not apply") stay out of the statistics (`nan_policy`), and groups without signal
give exactly 0, where float32 rounding can give 2.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from trl_ext_hooks import Config, Plugin, Refuse, Requirement, RewardName, Round, Scored, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_normalize, group_stats


def condition_rewards(rewards: torch.Tensor, target: int, on: int, threshold: float) -> torch.Tensor:
    """Copies (N, K) rewards, with 0 in column `target`, if not NaN, where `on` is NaN or below `threshold` (eq. 8)."""
    out = rewards.clone()
    out[~(rewards[:, on] >= threshold) & ~rewards[:, target].isnan(), target] = 0.0
    return out


def decoupled_sum(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-4, tol: float = 1e-6
) -> torch.Tensor:
    """Returns S = sum_k w_k * (R_k - mean_k) / (std_k + eps) of rewards (N, K), (N,) float64 (equations 4, 5 and 7)."""
    normalised = group_normalize(rewards.double(), group_ids, eps=eps, ddof=1, tol=tol)  # (N, K), 0 in constant groups
    total = (normalised * weights.double()).nansum(dim=1)  # NaN rewards add 0
    return torch.where(torch.isnan(rewards).all(dim=1), torch.nan, total)


def whiten(values: torch.Tensor, *, eps: float = 1e-4) -> torch.Tensor:
    """Returns (S - mean) / (std + eps) over all (N,) rows, std with ddof 1 (eq. 6). NaN rows, or one alone, give 0."""
    valid = values[~values.isnan()]
    if len(valid) < 2:
        return torch.zeros_like(values)
    return torch.where(values.isnan(), 0.0, (values - valid.mean()) / (valid.std() + eps))


def whiten_tokens(values: torch.Tensor, lengths: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Returns (S - mean) * rsqrt(var + eps), with statistics over tokens, as in the authors' verl fork; NaN gives 0."""
    tokens = values.repeat_interleave(lengths)
    tokens = tokens[~tokens.isnan()]
    if len(tokens) < 2:
        return torch.zeros_like(values)
    whitened = (values - tokens.mean()) * torch.rsqrt(tokens.var() + eps)
    return torch.where(values.isnan() | (lengths == 0), 0.0, whitened)


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
    """Returns the advantages (N,) of rewards (N, K): 0 for rows of NaN rewards only, and in batches without signal."""
    used = rewards
    if nan_policy == "zero":  # rows of the group -1 only fill up a process, and count for nothing
        used = torch.where((group_ids >= 0).unsqueeze(1), torch.nan_to_num(rewards), torch.nan)
    total = decoupled_sum(used, weights, group_ids, eps=group_eps, tol=tol)
    if not batch_norm:
        out = torch.nan_to_num(total)
    elif lengths is not None:
        out = whiten_tokens(total, lengths)
    else:  # the batch mean of S is 0 but for rounding, which must not give rows without signal an advantage
        out = torch.where(total == 0, 0.0, whiten(total, eps=batch_eps))
    return out.to(rewards.dtype)


@dataclass(frozen=True)
class Condition:
    """`target` counts only where `given` reaches `threshold`."""

    target: RewardName = option(help="reward that becomes 0 where the condition is missed")
    given: RewardName = option(help="reward that decides")  # not `on`, which YAML reads as true
    threshold: float = option(1.0, help="minimum `given` reward for `target` to count", source="paper, eq. 8")


class GDPO(Plugin):
    name = "gdpo"
    paper = "arXiv 2601.05242"
    bibtex = """@misc{gdpo2026,
      title = {{GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization}},
      eprint = {2601.05242},
      archivePrefix = {arXiv},
      year = {2026},
    }"""
    summary = "normalises every reward inside its group before adding them, then rescales over the batch"
    trainers = ("grpo",)  # RLOO does not normalise inside the group
    claims = ("estimator",)

    @dataclass(frozen=True)
    class Options:
        group_eps: float = option(1e-4, gt=0, help="added to a group's standard deviation", source="authors' fork, TRL")
        batch_eps: float = option(1e-4, gt=0, help="added to the batch's standard deviation", source="authors' fork")
        batch_norm: bool = option(True, help="rescale over the batch at the end", source="paper, eq. 6")
        whiten: Literal["sequence", "token"] = option(
            "sequence", help="batch statistics over rows, or over tokens: long rows weigh more", source="paper, eq. 6"
        )
        conditions: tuple[Condition, ...] = option(
            (), help="rewards that count only where another is reached: {target, given, threshold}", source="eq. 8"
        )
        nan_policy: Literal["exclude", "zero"] = option(
            "exclude", help="leave NaN rewards out of the statistics, or count them as 0", source="TRL; authors: zero"
        )
        zero_std_tol: float = option(1e-6, help="relative range up to which a group is constant", source="ours")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        if config.reward_names is not None and len(config.reward_names) == 1:
            yield Warn("one reward function leaves nothing to decouple; advantages stay those of plain GRPO")
        if config.args.reward_weights is not None and not any(config.args.reward_weights):
            yield Refuse("all reward_weights are 0.", "Give at least one reward a weight.")

    @hookimpl
    def rewards(self, scored: Scored) -> torch.Tensor | None:
        values = scored.rewards
        for rule in self.options.conditions:
            target, given = scored.reward_index(rule.target), scored.reward_index(rule.given)
            values = condition_rewards(values, target, given, rule.threshold)
        return values if self.options.conditions else None

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor | None:
        options, names = self.options, round.reward_names
        silent = group_stats(round.rewards, round.group_ids, tol=options.zero_std_tol).constant  # (N, K)
        for name, column in zip(names, silent.T, strict=True):
            round.log(f"zero_std/{name}", column)
        if len(names) == 1:
            return None
        settings = {name: getattr(options, name) for name in ("group_eps", "batch_eps", "batch_norm", "nan_policy")}
        settings |= {"tol": options.zero_std_tol, "lengths": round.lengths if options.whiten == "token" else None}
        return gdpo_advantages(round.rewards, round.reward_weights, round.group_ids, **settings)
