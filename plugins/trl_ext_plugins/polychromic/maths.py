"""Polychromic sets: the mean score of the sets that hold a completion, without listing them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from trl_ext_hooks.toolkit.groups import subgroup_ids

UNNAMED = -1
"""The strategy of a completion that has none."""


class SetScores(NamedTuple):
    """Mean scores of sets, each (N,) float64. Rows that are in no set have 0.

    Attributes:
        all_sets: Of all sets of the row's group.
        own_sets: Of those that hold the row.
        in_sets: Whether the row is in a set: bool.
    """

    all_sets: torch.Tensor
    own_sets: torch.Tensor
    in_sets: torch.Tensor


def none_drawn(total: torch.Tensor, marked: torch.Tensor, draws: int) -> torch.Tensor:
    """Returns the probability that none of `marked` among `total` things is among the first `draws`, float64."""
    probability = torch.ones_like(total)
    for drawn in range(draws):
        probability = probability * (total - marked - drawn).clamp(min=0) / (total - drawn).clamp(min=1)
    return probability


def set_scores(rewards: torch.Tensor, strategies: torch.Tensor, group_ids: torch.Tensor, set_size: int) -> SetScores:
    """Returns the mean of f(S) = mean reward of S * strategies in S / n, over the sets of n rows of every group.

    f(S) is a sum over a row of S and a strategy in S. So its mean over sets needs the chance that a strategy is drawn
    beside one given row, or beside two, which is 1 for a strategy of theirs.

    Args:
        rewards: (N,), NaN = the row is in no set.
        strategies: (N,) integers, `UNNAMED` = the row adds no strategy to a set.
        group_ids: (N,) integers.
        set_size: n. A group of fewer rows has no set.
    """
    n, valid = set_size, ~rewards.isnan()
    r = torch.where(valid, rewards, 0.0).double()
    parts = subgroup_ids(group_ids, strategies)
    group, kind = (torch.unique(ids, return_inverse=True)[1] for ids in (group_ids, parts))
    groups, kinds = int(group.max()) + 1, int(kind.max()) + 1

    def total(values: torch.Tensor, index: torch.Tensor, length: int) -> torch.Tensor:
        return values.new_zeros(length).index_add_(0, index, values)

    group_of = group.new_zeros(kinds).scatter_(0, kind, group)  # (kinds,)
    named = torch.zeros(kinds, dtype=torch.bool, device=r.device).scatter_(0, kind, strategies != UNNAMED)
    size = total(valid.double(), group, groups)
    count = total(valid.double(), kind, kinds)

    def chances(given: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns how many strategies are seen beside `given` rows (groups,), and the chance to miss each (kinds,)."""
        missed = none_drawn(size[group_of] - given, count, n - given)
        seen = total(torch.where(named, 1 - missed, 0.0), group_of, groups)
        return seen, torch.where(named, missed, 0.0)

    seen, missed = chances(1)
    beside_one = seen[group] + missed[kind]  # (N,) expected strategies of a set that holds the row
    seen, missed = chances(2)
    other_reward = total(r, group, groups)[group] - r
    # a second row of another strategy brings that strategy along
    brought = total(r * missed[kind], kind, kinds)
    brought_by_others = total(brought, group_of, groups)[group] - brought[kind]
    pairs = (seen[group] + missed[kind]) * other_reward + brought_by_others
    rows = size[group]
    own = (r * beside_one + (n - 1) / (rows - 1).clamp(min=1) * pairs) / n**2
    every = total(r * beside_one, group, groups)[group] / (rows.clamp(min=1) * n)
    in_sets = valid & (rows >= n)
    return SetScores(torch.where(in_sets, every, 0.0), torch.where(in_sets, own, 0.0), in_sets)


def polychromic_advantages(rewards: torch.Tensor, scores: SetScores) -> torch.Tensor:
    """Returns the mean score of the sets with a row minus that of all sets: (N,), exactly 0 where they are equal."""
    difference = scores.own_sets - scores.all_sets
    # equal means differ by rounding, which an optimizer that normalises gradients would follow
    rounding = 1e-12 * rewards.nan_to_num(nan=0.0).abs().max()
    return torch.where(difference.abs() <= rounding, 0.0, difference).to(rewards.dtype)
