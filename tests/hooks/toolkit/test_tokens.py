"""Values per token and the states that predict tokens, on rows small enough to write down."""

from __future__ import annotations

import pytest
import torch

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
