"""DVAO: dynamic variance-adaptive advantage optimisation (arXiv 2605.25604).

GRPO divides the centred sum of all rewards by the deviation of the sum. That is small where rewards pull apart, so the
advantages become large. DVAO divides by the sum of the deviations. This weighs the normalised advantage of every reward
by its share of the spread inside the group, and no advantage is larger than GRPO's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from trl_ext_hooks import Config, Plugin, Refuse, Requirement, Round, Warn, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_stats


def spread_shares(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-4, tol: float = 1e-6
) -> torch.Tensor:
    """Returns the weight of every reward in each row's group, w_k std_k / (sum_l w_l std_l + eps): (N, K) float64."""
    spread = weights.double() * group_stats(rewards, group_ids, ddof=1, tol=tol).std
    return spread / (spread.sum(dim=1, keepdim=True) + eps)


def dvao_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, *, eps: float = 1e-4, tol: float = 1e-6
) -> torch.Tensor:
    """Returns sum_k w_k (r_k - mean_k) / (sum_l w_l std_l + eps) of rewards (N, K): (N,).

    The closed form has no quotient 0 / 0 per reward. A reward that is constant in the group, or NaN, adds exactly 0.
    """
    stats = group_stats(rewards, group_ids, ddof=1, tol=tol)
    silent = stats.constant | (stats.count <= 1)
    centred = torch.where(silent, 0.0, rewards.double() - stats.mean)
    total = (weights.double() * centred).nansum(dim=1)
    spread = (weights.double() * stats.std).sum(dim=1)
    return (total / (spread + eps)).to(rewards.dtype)


class DVAO(Plugin):
    name = "dvao"
    paper = "arXiv 2605.25604"
    bibtex = """@misc{dvao2026,
      title = {{DVAO: Dynamic Variance-adaptive Advantage Optimization for Multi-reward Reinforcement Learning}},
      eprint = {2605.25604},
      archivePrefix = {arXiv},
      year = {2026},
    }"""
    summary = "weighs every reward by its spread inside the group, which bounds the advantages"
    trainers = ("grpo", "rloo")
    claims = ("estimator",)

    @dataclass(frozen=True)
    class Options:
        eps: float = option(1e-4, gt=0, help="added to the sum of the standard deviations", source="ours, as TRL")
        zero_std_tol: float = option(1e-6, help="relative range up to which a group is constant", source="ours")

    options: Options

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        weights = config.args.reward_weights or ()
        if any(weight < 0 for weight in weights) or (weights and not any(weights)):
            yield Refuse(
                f"reward_weights={list(weights)} must not be negative, and one must be above 0.",
                "Turn the reward around instead of its weight.",
            )
        if config.reward_names is not None and len(config.reward_names) == 1:
            yield Warn("one reward function has nobody to share the weight with; advantages stay those of plain GRPO")
        if config.args.num_generations <= 4:
            yield Warn("4 completions per prompt or fewer make the deviations noisy; the paper uses 16")

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor:
        eps, tol = self.options.eps, self.options.zero_std_tol
        shares = spread_shares(round.rewards, round.reward_weights, round.group_ids, eps=eps, tol=tol)
        for name, column in zip(round.reward_names, shares.T, strict=True):
            round.log(f"weight/{name}", column)
        return dvao_advantages(round.rewards, round.reward_weights, round.group_ids, eps=eps, tol=tol)
