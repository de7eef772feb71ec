"""Token positions: values per token laid out like log-probabilities, and the states that predict tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..plugin import UsageError

if TYPE_CHECKING:
    from ..pairs import Pairs


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


def pair_columns(pairs: Pairs, name: str) -> torch.Tensor:
    """Reads a value per completion token from the columns `chosen_NAME` and `rejected_NAME` of a batch of pairs.

    `TrainerView.precompute_pairs` makes such columns, and a user's data may have them. Data must be text.

    Returns:
        (2n, L-1), laid out like the log-probabilities.

    Raises:
        UsageError: A row has another number of values than its answer has tokens.
    """
    values: list[Sequence[float]] = []
    for side in ("chosen", "rejected"):
        for row in pairs.rows:
            row_values, ids = row[f"{side}_{name}"], row[f"{side}_ids"]
            if len(row_values) != len(ids):
                raise UsageError(
                    f"{side}_{name} has {len(row_values)} numbers for the {len(ids)} tokens of "
                    f"{_excerpt(pairs, ids)!r}; it needs one per token, the end of the answer included"
                )
            values.append(row_values)
    return align_tokens(values, pairs.batch["completion_mask"], truncation=pairs.trainer.args.truncation_mode)


def check_pair_values(pairs: Pairs, name: str, values: torch.Tensor) -> None:
    """Checks values per token of a batch of pairs, such as those of a user's function.

    Args:
        pairs: The batch.
        name: What the values are, for the error.
        values: (2n, L-1); outside the completions anything is allowed.

    Raises:
        UsageError: They have another shape, or one of them is not finite.
    """
    if values.shape != pairs.mask.shape:
        raise UsageError(
            f"{name} have the shape {tuple(values.shape)}, expected {tuple(pairs.mask.shape)}: one row per chosen "
            f"answer, then one per rejected answer"
        )
    bad = (~torch.isfinite(values) & pairs.mask).nonzero()
    if len(bad):
        row, token = bad[0].tolist()
        side, pair = ("chosen", row) if row < len(pairs.rows) else ("rejected", row - len(pairs.rows))
        ids = pairs.batch["input_ids"][row][pairs.batch["attention_mask"][row] != 0]
        raise UsageError(
            f"{name} of pair {pair} in this batch ({side}, position {token + 1}) is {values[row, token].item()}; its "
            f"text: {_excerpt(pairs, ids)!r}"
        )


def _excerpt(pairs: Pairs, ids: Sequence[int] | torch.Tensor) -> str:
    return str(pairs.trainer.tokenizer.decode(ids))[:200]
