"""Mathematics of dynamic reward weighting: hypervolumes of points, and weights from gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from trl_ext_hooks.toolkit.groups import group_normalize, group_stats

Point = Sequence[float]
"""K objectives, each the larger the better."""


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other one equals or exceeds in every objective. Of equal points one stays."""
    kept: list[Point] = []
    for point in points:
        if not any(_covers(other, point) for other in kept):
            kept = [other for other in kept if not _covers(point, other)] + [point]
    return kept


def _covers(one: Point, other: Point) -> bool:
    return all(a >= b for a, b in zip(one, other, strict=True))


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Returns the volume between a reference and the front of the points. A point below it is moved to it first."""
    corners = front([[max(a, b) for a, b in zip(point, reference, strict=True)] for point in points])
    if not corners:
        return 0.0
    if len(reference) == 1:
        return corners[0][0] - reference[0]
    # slabs along the last objective, from the highest corner down to the reference
    corners.sort(key=lambda corner: corner[-1], reverse=True)
    floors = [corner[-1] for corner in corners[1:]] + [reference[-1]]
    volume = 0.0
    for place, (corner, floor) in enumerate(zip(corners, floors, strict=True), start=1):
        if corner[-1] > floor:
            base = hypervolume([other[:-1] for other in corners[:place]], reference[:-1])
            volume += (corner[-1] - floor) * base
    return volume


def contribution(point: Point, archive: Sequence[Point], reference: Point) -> float:
    """Returns how much a point adds to the hypervolume of the archive: exactly 0 if it does not extend the front."""
    return max(0.0, hypervolume([*archive, point], reference) - hypervolume(archive, reference))


def multiplier(gain: float) -> float:
    """Returns the factor of the next step, 0.5 + 1.5 tanh(gain): from 0.5 without a contribution to 2."""
    return 0.5 + 1.5 * math.tanh(gain)


def single_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, scale: str = "group", leave_one_out: bool = False
) -> torch.Tensor:
    """Returns the advantages that every reward (N, K) alone would give: (N, K), 0 where a reward does not apply.

    Args:
        rewards: NaN = does not apply.
        group_ids: (N,).
        scale: What centred rewards are divided by, as TRL's `scale_rewards`: "group", "batch" or "none".
        leave_one_out: Whether the baseline is the mean of the other rows of the group, as in RLOO.
    """
    centred = group_normalize(rewards, group_ids, scale=scale == "group")
    if scale == "batch":
        whole = group_stats(rewards, torch.zeros_like(group_ids))
        centred = centred / (whole.std + 1e-4).to(centred.dtype)
    if leave_one_out:
        count = group_stats(rewards, group_ids).count
        centred = centred * (count / (count - 1).clamp(min=1)).to(centred.dtype)
    return centred.nan_to_num(nan=0.0)


def clipped_gradients(gradients: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Returns gradients (K, P), those with a norm above `max_norm` scaled down to it. None or 0 clips nothing."""
    if not max_norm:
        return gradients
    return gradients * (max_norm / gradients.norm(dim=1, keepdim=True).clamp(min=max_norm))


def influences(gradients: torch.Tensor) -> torch.Tensor:
    """Returns sum_j <g_k, g_j> of gradients (K, P), j = k included: (K,)."""
    return gradients @ gradients.sum(dim=0)


def moved_weights(weights: torch.Tensor, influence: torch.Tensor, rate: float) -> torch.Tensor:
    """Returns softmax(log w + rate * influence) of weights (K,). Their sum is 1, and a weight of 0 stays 0."""
    return torch.softmax(weights.log() + rate * influence, dim=0)
