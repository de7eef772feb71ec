"""Tensor functions that plugins share: group statistics, pairs of a group, masked means, weighted gradients, counts.

Groups are given by `group_ids` (N,), so groups may differ in size and their rows need not be neighbours. Statistics are
computed in float64 and leave NaN entries out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """Mean and spread of every group.

    Equal float32 numbers have a mean that is off by rounding, and a deviation that is not 0. Divided by a small epsilon
    that becomes an advantage, so a group is called constant by its range and its deviation is then exactly 0.

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
    """(value - group mean) / (group std + eps), or only the difference when `scale` is off.

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
    """All unordered pairs of different rows of one group.

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


def scale_gradient(values: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """The same values, whose gradient is multiplied by `factor` (same shape or broadcast); None leaves it alone."""
    if factor is None:
        return values
    constant = values.detach()
    return constant + factor * (values - constant)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of the `values` where `mask` is 1, over `dim` or everything; 0 where nothing is counted."""
    dims = tuple(range(values.dim())) if dim is None else dim
    return (values * mask).sum(dims) / mask.sum(dims).clamp(min=1)


def predicting(hidden_states: torch.Tensor, tokens: int) -> torch.Tensor:
    """The hidden states from which the last `tokens` tokens of each row are predicted: those one position before.

    Args:
        hidden_states: (B, L, H) with L > tokens.

    Returns:
        (B, tokens, H): entry t is about the t-th of these tokens.
    """
    if hidden_states.shape[1] <= tokens:
        raise ValueError(f"{hidden_states.shape[1]} positions do not hold {tokens} tokens and the one before them")
    return hidden_states[:, -tokens - 1 : -1]


def align_tokens(values: Sequence[Sequence[float]], mask: torch.Tensor, *, truncation: str) -> torch.Tensor:
    """Lays one value per completion token out like the log-probabilities of a batch of pairs.

    Args:
        values: One sequence per row of `mask`, with a value for every completion token before truncation.
        mask: (R, L) `completion_mask`: true on the completion tokens that truncation left, which are neighbours.
        truncation: TRL's `truncation_mode`: `"keep_start"` cut the last tokens of a row off, `"keep_end"` the first.

    Returns:
        (R, L-1) float32, 0 outside the mask. Entry t belongs to token t + 1; token 0 has no entry.

    Raises:
        ValueError: A row has fewer values than tokens.
    """
    out = torch.zeros(mask.shape, dtype=torch.float32)
    counts, starts = mask.sum(1).tolist(), mask.int().argmax(1).tolist()
    for row, (own, count, start) in enumerate(zip(values, counts, starts, strict=True)):
        if len(own) < count:
            raise ValueError(f"row {row} has {len(own)} values for {count} completion tokens")
        kept = own[len(own) - count :] if truncation == "keep_end" else own[:count]
        out[row, start : start + count] = torch.tensor(kept, dtype=torch.float32)
    return out[:, 1:].to(mask.device)


def count_tool_messages(completions: Sequence[Any]) -> torch.Tensor:
    """Executed tool calls of each completion: its messages with the role `tool`.

    A failed call answers with a message too and counts. A call that the model wrote and nobody executed (turn limit, or
    a result that would not have fitted) has no message and does not count. Parallel calls in one turn count one each.

    Args:
        completions: b lists of messages; a plain text holds no messages and counts 0.

    Returns:
        (b,) int64.
    """
    counts = [
        0 if isinstance(completion, str) else sum(message.get("role") == "tool" for message in completion)
        for completion in completions
    ]
    return torch.tensor(counts, dtype=torch.int64)


def count_tag(texts: Sequence[str], tag: str) -> torch.Tensor:
    """How often `tag` stands in each text, without overlaps: tool calls of rollouts that are plain text.

    Returns:
        (b,) int64.
    """
    if not tag:
        raise ValueError("the tag must not be empty")
    return torch.tensor([text.count(tag) for text in texts], dtype=torch.int64)
