"""Group statistics: mean, deviation, normalisation and pairs inside the groups of a round.

Groups are given by `group_ids` (N,), so groups may differ in size and their rows need not be neighbours. Statistics are
computed in float64 and leave NaN entries out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GroupStats:
    """Statistics of each row's own group, repeated on its rows; all (N,) or (N, K) like the values they describe.

    Attributes:
        count: Rows of the group that are not NaN.
        mean: Their mean; NaN for a group without any.
        std: Their standard deviation; 0 where `count <= ddof` or the group is constant.
        constant: Whether the group carries no signal: max - min <= tol * max(1, |max|), or nothing but NaN.
    """

    count: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    constant: torch.Tensor


def group_stats(values: torch.Tensor, group_ids: torch.Tensor, *, ddof: int = 1, tol: float = 1e-6) -> GroupStats:
    """Returns mean and spread of every group.

    Equal float32 numbers have a mean that is off by rounding, and a deviation that is not 0. Divided by a small epsilon
    that becomes an advantage. So a group is called constant by its range, and its deviation is then exactly 0.

    Args:
        values: (N,) or (N, K); NaN entries are left out.
        group_ids: (N,) integers; equal numbers, equal group.
        ddof: Divisor of the variance is `count - ddof`.
        tol: Range, relative to the largest magnitude (at least 1), up to which a group is constant.

    Returns:
        Statistics in float64, on the rows of `values`.
    """
    if group_ids.shape != values.shape[:1]:
        raise ValueError(f"group_ids must have shape {tuple(values.shape[:1])}, got {tuple(group_ids.shape)}")
    columns = values.double() if values.dim() == 2 else values.double().unsqueeze(1)  # (N, K)
    index = torch.unique(group_ids, return_inverse=True)[1]
    groups = int(index.max()) + 1 if len(index) else 0
    valid = ~torch.isnan(columns)

    def total(x: torch.Tensor) -> torch.Tensor:  # (N, K) -> each row's group total (N, K)
        return x.new_zeros(groups, x.shape[1]).index_add_(0, index, x)[index]

    def extreme(x: torch.Tensor, kind: str) -> torch.Tensor:
        where = index.unsqueeze(1).expand_as(x)
        return x.new_zeros(groups, x.shape[1]).scatter_reduce_(0, where, x, kind, include_self=False)[index]

    count = total(valid.double())
    mean = total(torch.where(valid, columns, 0.0)) / count
    variance = total(torch.where(valid, (columns - mean) ** 2, 0.0)) / (count - ddof).clamp(min=1)
    highest = extreme(torch.where(valid, columns, -torch.inf), "amax")
    lowest = extreme(torch.where(valid, columns, torch.inf), "amin")
    constant = (count == 0) | (highest - lowest <= tol * highest.abs().clamp(min=1.0))
    std = torch.where(constant | (count <= ddof), 0.0, variance.sqrt())
    return GroupStats(*(x.reshape(values.shape) for x in (count, mean, std, constant)))


def group_normalize(
    values: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    scale: bool = True,
    eps: float = 1e-4,
    ddof: int = 1,
    tol: float = 1e-6,
) -> torch.Tensor:
    """Returns (value - group mean) / (group std + eps), or only the difference when `scale` is off.

    Args:
        values: (N,) or (N, K).
        group_ids: (N,).
        eps: Added to the standard deviation.
        ddof, tol: As in `group_stats`.

    Returns:
        The shape and dtype of `values`. Constant groups and groups with one valid row give exactly 0; NaN stays NaN.
    """
    stats = group_stats(values, group_ids, ddof=ddof, tol=tol)
    centred = values.double() - stats.mean
    out = centred / (stats.std + eps) if scale else centred
    out = torch.where(stats.constant | (stats.count <= 1), 0.0, out)
    return torch.where(torch.isnan(values), torch.nan, out).to(values.dtype)


def group_pairs(group_ids: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Returns all unordered pairs of different rows of one group.

    Args:
        group_ids: (N,) integers; equal numbers, equal group.
        keep: (N,) bool; rows that may be in a pair, all by default.

    Returns:
        (P, 2) row numbers, the smaller one first; (0, 2) where no group has two rows to keep.
    """
    together = group_ids.unsqueeze(0) == group_ids.unsqueeze(1)  # (N, N)
    if keep is not None:
        together = together & keep.unsqueeze(0) & keep.unsqueeze(1)
    return together.triu(diagonal=1).nonzero()


def label_ids(labels: Sequence[Hashable | None], *, missing: int = -1) -> torch.Tensor:
    """Numbers labels, equal ones alike, in the order in which they first come: (N,) int64.

    Args:
        labels: N labels of all processes, as `trainer.gather_objects` returns them.
        missing: The number of None.
    """
    numbers: dict[Hashable, int] = {}
    known = [missing if label is None else numbers.setdefault(label, len(numbers)) for label in labels]
    return torch.tensor(known, dtype=torch.int64)


def subgroup_ids(group_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Numbers the parts into which labels divide groups: (N,) int64, equal where group and label are equal.

    Rows of the group -1, which only fill up a process, stay in it.

    Args:
        group_ids: (N,) integers.
        labels: (N,) integers.
    """
    parts = torch.unique(torch.stack([group_ids, labels.to(group_ids)], dim=1), dim=0, return_inverse=True)[1]
    return torch.where(group_ids < 0, -1, parts)
