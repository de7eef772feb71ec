"""The mathematics of reward-model ensembles: a loop of the definitions, their order, and scores that are missing."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_plugins.rm_ensemble import Objective, combine, disagreement

SEEDS = st.integers(0, 10_000)
OBJECTIVES: tuple[Objective, ...] = ("mean", "wco", "uwo")
NAN = math.nan


def drawn(seed: int, models: int = 4, rows: int = 6) -> torch.Tensor:
    return torch.randn(models, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 6), st.floats(0, 2))
def test_it_is_the_loop_of_the_definition(seed: int, models: int, coefficient: float) -> None:
    scores = drawn(seed, models)
    columns = scores.T.tolist()
    assert combine(scores, "mean").tolist() == pytest.approx([statistics.fmean(column) for column in columns])
    assert combine(scores, "wco").tolist() == [min(column) for column in columns]
    expected = [statistics.fmean(column) - coefficient * statistics.pvariance(column) for column in columns]
    assert combine(scores, "uwo", coefficient).tolist() == pytest.approx(expected, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_order_of_the_objectives_and_of_the_models(seed: int) -> None:
    scores = drawn(seed)
    mean, lowest = combine(scores, "mean"), combine(scores, "wco")
    assert torch.equal(combine(scores, "uwo", 0.0), mean) and (lowest < mean).all()
    penalties = [combine(scores, "uwo", coefficient) for coefficient in (0.1, 0.5, 1.0)]
    assert (penalties[0] > penalties[1]).all() and (penalties[1] > penalties[2]).all() and (penalties[0] < mean).all()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    for objective in OBJECTIVES:
        torch.testing.assert_close(combine(scores[order], objective), combine(scores, objective))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_one_model_and_models_that_agree_are_the_score_itself(objective: Objective) -> None:
    one = drawn(3, models=1)
    assert torch.equal(combine(one, objective), one[0])
    eighths = (8 * one).round() / 8  # sums of three of them are exact
    assert torch.equal(combine(eighths.expand(3, -1), objective, 1.0), eighths[0])


def test_missing_scores_are_left_out() -> None:
    scores = torch.tensor([[1.0, NAN, NAN], [3.0, 2.0, NAN], [NAN, 4.0, NAN]])
    assert combine(scores, "mean").tolist() == pytest.approx([2.0, 3.0, NAN], nan_ok=True)
    assert combine(scores, "wco").tolist() == pytest.approx([1.0, 2.0, NAN], nan_ok=True)
    # both variances are 1: of 1 and 3, and of 2 and 4, with divisor 2
    assert disagreement(scores).tolist() == pytest.approx([1.0, 1.0, NAN], nan_ok=True)
    assert combine(scores, "uwo", 0.5).tolist() == pytest.approx([1.5, 2.5, NAN], nan_ok=True)
