"""Values per token of preference pairs, as columns of the data bring them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..pairs import Pairs
from ..plugin import UsageError
from .tokens import align_tokens


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
