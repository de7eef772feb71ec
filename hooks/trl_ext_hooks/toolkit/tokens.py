"""Token positions: values per token laid out like log-probabilities, and the states that predict tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def predicting(hidden_states: torch.Tensor, tokens: int) -> torch.Tensor:
    """Returns the hidden states from which the last `tokens` tokens of each row are predicted: those one place before.

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
    aligned = torch.zeros(mask.shape, dtype=torch.float32)
    counts, starts = mask.sum(1).tolist(), mask.int().argmax(1).tolist()
    for row, (row_values, count, start) in enumerate(zip(values, counts, starts, strict=True)):
        if len(row_values) < count:
            raise ValueError(f"row {row} has {len(row_values)} values for {count} completion tokens")
        kept = row_values[len(row_values) - count :] if truncation == "keep_end" else row_values[:count]
        aligned[row, start : start + count] = torch.tensor(kept, dtype=torch.float32)
    return aligned[:, 1:].to(mask.device)
