"""Intervals and verdicts against cases whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.compare import statistics
from trl_ext.compare.statistics import Estimate

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def test_an_interval_by_enumeration() -> None:
    """All 27 resamples of three values, each equally likely, against the drawn ones."""
    values = np.array([0.0, 1.0, 5.0])
    exact = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    drawn = statistics.resampled_means(values[:, None])[:, 0]
    assert len(drawn) == 10_000
    for value in set(exact):
        share = sum(abs(value - other) < 1e-12 for other in exact) / 27
        assert np.isclose(drawn, value).mean() == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(("n", "tail"), [(2, 0.0), (5, 0.00096), (10, 0.00856), (20, 0.0159), (100000, 0.025)])
def test_tails_are_widened_for_few_seeds(n: int, tail: float) -> None:
    """`Phi(-sqrt(n / (n - 1)) t)`, with Student's quantiles from a table: 2.776 for 4, 2.262 for 9, 2.093 for 19."""
    assert statistics._tail(n) == pytest.approx(tail, rel=0.03, abs=1e-4)


@pytest.mark.parametrize("n", [6, 10, 20])
def test_intervals_hold_the_mean_as_often_as_they_say(n: int) -> None:
    """2000 samples each of normal and of skewed data. Plain percentile intervals of 6 values reach 85 % and 81 %."""
    random = np.random.default_rng(n)
    tail = statistics._tail(n)
    for draw, mean, least in ((random.normal, 0.0, 0.91), (random.exponential, 1.0, 0.87)):
        samples = draw(size=(n, 2000))
        low, high = np.quantile(statistics.resampled_means(samples, 1500), [tail, 1 - tail], axis=0)
        assert least < ((low <= mean) & (mean <= high)).mean() < 0.97


def test_arms_that_do_not_differ_seldom_get_a_verdict_and_arms_that_do_get_it() -> None:
    random = np.random.default_rng(0)
    found = []
    for shift in (0.0, 2.0):
        seeds = random.normal(scale=5.0, size=(200, 10))  # what a seed adds to both arms
        pairs = [(s + random.normal(size=10) + shift, s + random.normal(size=10)) for s in seeds]
        found.append([statistics.verdict(statistics.difference(a, b), "higher") for a, b in pairs])
    none, some = found
    assert none.count("not distinguishable") >= 180
    assert some.count("better") >= 195 and "worse" not in some  # pairing takes out what the seeds add
    assert not statistics.apart(statistics.estimate(pairs[0][0]), statistics.estimate(pairs[0][1]))


def test_identical_arms() -> None:
    found = statistics.difference([0.5, 0.7, 0.9], [0.5, 0.7, 0.9])
    assert found == Estimate(0.0, 0.0, 0.0) and statistics.verdict(found, "higher") == "not distinguishable"
    assert statistics.ratio([3.0, 5.0], [3.0, 5.0]) == Estimate(1.0, 1.0, 1.0)


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    found = statistics.difference([5.0, 6.0, 7.0], [1.0, 2.0, 3.0])
    assert (found.mean, found.low, found.high) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("ends", "better", "expected"),
    [
        ((0.1, 0.3), "higher", "better"),
        ((0.1, 0.3), "lower", "worse"),
        ((-0.3, -0.1), "higher", "worse"),
        ((-0.3, -0.1), "lower", "better"),
        ((-0.1, 0.3), "higher", "not distinguishable"),
        ((0.0, 0.3), "higher", "not distinguishable"),
    ],
)
def test_verdicts(ends: tuple[float, float], better: statistics.Direction, expected: str) -> None:
    assert statistics.verdict(Estimate(sum(ends) / 2, *ends), better) == expected


def test_apart() -> None:
    one = Estimate(1.0, 0.5, 1.5)
    assert statistics.apart(one, Estimate(2.0, 1.6, 2.4)) and statistics.apart(Estimate(2.0, 1.6, 2.4), one)
    assert not statistics.apart(one, Estimate(2.0, 1.5, 2.4)) and not statistics.apart(one, one)


def test_a_ratio_of_means() -> None:
    found = statistics.ratio([50.0, 60.0, 70.0], [100.0, 120.0, 140.0])
    assert found is not None and (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert statistics.ratio([1.0, 2.0], [0.0, 0.0]) is None
    assert statistics.ratio([1.0, 2.0], [-1.0, 2.0]) is None  # a resample of the first value alone is negative


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0], [3.0, 4.0]]])
def test_what_has_no_interval_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="an interval needs"):
        statistics.estimate(values)


def test_unpaired_values_and_one_curve_are_refused() -> None:
    with pytest.raises(ValueError, match="paired by seed, got 3 and 2"):
        statistics.difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least two seeds, got 1"):
        statistics.band([[1.0, 2.0, 3.0]])


@given(VALUES)
def test_an_interval_holds_its_mean_stays_in_the_data_and_repeats(values: list[float]) -> None:
    found = statistics.estimate(values)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= found.low <= found.high <= max(values) + slack
    assert found.mean == pytest.approx(sum(values) / len(values), abs=1e-9)
    assert statistics.estimate(values) == found


def test_a_band_is_the_interval_of_every_step() -> None:
    curves = np.random.default_rng(1).normal(size=(7, 4))
    mean, low, high = statistics.band(curves, resamples=10_000)
    for step in range(4):
        found = statistics.estimate(curves[:, step])
        assert (mean[step], low[step], high[step]) == pytest.approx((found.mean, found.low, found.high))


def test_chance() -> None:
    assert [statistics.chance(n) for n in (2, 5, 6)] == [0.5, 0.0625, 0.03125]
