"""Values per token and the states that predict tokens, on rows small enough to write down."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from trl_ext_hooks import Pairs, UsageError
from trl_ext_hooks.toolkit.pair_values import check_pair_values, pair_columns
from trl_ext_hooks.toolkit.tokens import align_tokens, predicting


def test_a_token_is_predicted_one_position_before() -> None:
    states = torch.arange(10.0).reshape(1, 5, 2)
    assert predicting(states, 2).tolist() == [[[4.0, 5.0], [6.0, 7.0]]]
    with pytest.raises(ValueError, match="5 positions do not hold 5 tokens"):
        predicting(states, 5)


@pytest.mark.parametrize(("truncation", "kept"), [("keep_start", [1.0, 2.0]), ("keep_end", [2.0, 3.0])])
def test_values_follow_the_tokens_that_truncation_left(truncation: str, kept: list[float]) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 0]])
    found = align_tokens([[1.0, 2.0, 3.0], [5.0, 6.0]], mask, truncation=truncation)
    assert found.tolist() == [[0.0, *kept], [5.0, 6.0, 0.0]]


def test_too_few_values_are_refused() -> None:
    with pytest.raises(ValueError, match="row 0 has 1 values for 2 completion tokens"):
        align_tokens([[1.0]], torch.tensor([[0, 1, 1]]), truncation="keep_start")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("longest", [3, 5, 8, 40])
def test_token_values_stay_with_their_tokens(truncation: str, longest: int) -> None:
    """Every value is its token's id, so after any truncation values and ids must be the same numbers."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    rows = [
        {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8]},
        {"prompt_ids": [], "chosen_ids": [9, 10], "rejected_ids": [11, 12, 13, 14]},
        {"prompt_ids": [15], "chosen_ids": [], "rejected_ids": [16, 17]},
    ]
    batch = DataCollatorForPreference(pad_token_id=0, max_length=longest, truncation_mode=truncation)(rows)
    values = [row[f"{side}_ids"] for side in ("chosen", "rejected") for row in rows]
    aligned = align_tokens(values, batch["completion_mask"], truncation=truncation)
    expected = (batch["input_ids"] * batch["completion_mask"])[:, 1:]
    assert aligned.shape == expected.shape and torch.equal(aligned.long(), expected)


# --- values of pairs --------------------------------------------------------------------------------------------------


def made(truncation: str = "keep_start", **columns: Any) -> Pairs:
    """One pair: a prompt of two tokens, a chosen answer of three and a rejected one of one."""
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [1, 2, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "completion_mask": torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 0, 0]]),
    }
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"tokens {[int(i) for i in ids]}")
    trainer: Any = types.SimpleNamespace(args=types.SimpleNamespace(truncation_mode=truncation), tokenizer=tokenizer)
    return Pairs("train", 0, trainer, batch, [{"chosen_ids": [3, 4, 5], "rejected_ids": [6], **columns}])


def test_columns_of_values_per_token() -> None:
    pairs = made(chosen_worth=[0.1, 0.2, 0.3], rejected_worth=[7.0])
    expected = torch.tensor([[0, 0.1, 0.2, 0.3], [0, 7.0, 0, 0]])
    torch.testing.assert_close(pair_columns(pairs, "worth"), expected)


def test_a_column_with_another_number_of_values() -> None:
    pairs = made(chosen_worth=[0.1, 0.2, 0.3], rejected_worth=[7.0, 8.0])
    with pytest.raises(UsageError, match=r"rejected_worth has 2 numbers for the 1 tokens of 'tokens \[6\]'"):
        pair_columns(pairs, "worth")


def test_values_of_a_batch_are_checked_inside_the_completions_only() -> None:
    values = torch.zeros(2, 4)
    values[0, 0] = values[1, 3] = torch.nan
    check_pair_values(made(), "worth", values)
    values[1, 1] = torch.inf
    with pytest.raises(UsageError, match=r"worth of pair 0 in this batch \(rejected, position 2\) is inf.*\[1, 2, 6\]"):
        check_pair_values(made(), "worth", values)
    with pytest.raises(UsageError, match=r"worth have the shape \(2, 3\), expected \(2, 4\)"):
        check_pair_values(made(), "worth", values[:, 1:])
