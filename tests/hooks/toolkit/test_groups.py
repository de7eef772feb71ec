"""Statistics and pairs of groups against plain loops."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize, group_pairs, group_stats, label_ids, subgroup_ids

NAN = math.nan
VALUES = st.one_of(st.just(NAN), st.integers(-3, 3).map(float), st.floats(-100, 100, allow_nan=False, width=32))
ROWS = st.lists(st.tuples(VALUES, st.integers(0, 4)), min_size=1, max_size=20)


def loop(values: list[float], groups: list[int], row: int, ddof: int, tol: float) -> tuple[float, float, float, bool]:
    """(count, mean, std, constant) of the group of a row, written as the docstring says it."""
    mine = [v for v, g in zip(values, groups, strict=True) if g == groups[row] and not math.isnan(v)]
    if not mine:
        return 0, NAN, 0.0, True
    constant = max(mine) - min(mine) <= tol * max(1.0, abs(max(mine)))
    mean = math.fsum(mine) / len(mine)
    if constant or len(mine) <= ddof:
        return len(mine), mean, 0.0, constant
    return len(mine), mean, math.sqrt(sum((v - mean) ** 2 for v in mine) / (len(mine) - ddof)), False


@settings(max_examples=150, deadline=None)
@given(ROWS, st.sampled_from([0, 1]))
def test_group_stats_are_those_of_a_loop(rows: list[tuple[float, int]], ddof: int) -> None:
    values, groups = map(list, zip(*rows, strict=True))
    found = group_stats(torch.tensor(values, dtype=torch.float64), torch.tensor(groups), ddof=ddof)
    for row in range(len(rows)):
        count, mean, std, constant = loop(values, groups, row, ddof, 1e-6)
        assert found.count[row] == count
        assert found.mean[row].item() == pytest.approx(mean, abs=1e-9, nan_ok=True)
        assert found.std[row].item() == pytest.approx(std, abs=1e-9)
        assert bool(found.constant[row]) == constant


@settings(max_examples=100, deadline=None)
@given(ROWS, st.booleans())
def test_group_normalize_is_a_loop(rows: list[tuple[float, int]], scale: bool) -> None:
    values, groups = map(list, zip(*rows, strict=True))
    given_values = torch.tensor(values, dtype=torch.float64)
    found = group_normalize(given_values, torch.tensor(groups), scale=scale, eps=1e-3)
    for row, value in enumerate(values):
        count, mean, std, constant = loop(values, groups, row, 1, 1e-6)
        expected = 0.0 if constant or count <= 1 else (value - mean) / ((std + 1e-3) if scale else 1.0)
        expected = NAN if math.isnan(value) else expected
        assert found[row].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_numbers_typed_by_hand() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, NAN], [NAN, NAN], [2.0, 4.0], [2.0, 8.0]])
    groups = torch.tensor([7, 7, 7, 2, 2])
    found = group_stats(values, groups)
    nan = torch.nan
    assert found.count.tolist() == [[2, 1], [2, 1], [2, 1], [2, 2], [2, 2]]
    assert found.mean.tolist() == [[2, 5], [2, 5], [2, 5], [2, 6], [2, 6]]
    assert found.constant.tolist() == [[False, True]] * 3 + [[True, False]] * 2
    expected = torch.tensor(
        [[math.sqrt(2), 0], [math.sqrt(2), 0], [math.sqrt(2), 0], [0, math.sqrt(8)], [0, math.sqrt(8)]]
    )
    torch.testing.assert_close(found.std, expected.double(), atol=1e-7, rtol=0)
    centred = group_normalize(values, groups, scale=False)
    torch.testing.assert_close(
        centred, torch.tensor([[-1, 0], [1, nan], [nan, nan], [0, -2], [0, 2]]), equal_nan=True, atol=0, rtol=0
    )
    assert centred.dtype == torch.float32


@pytest.mark.parametrize("size", [1, 3, 6, 7, 12, 100])
@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, -0.1, 1e6 + 0.1, 0.0])
def test_equal_float32_numbers_give_exactly_nothing(size: int, value: float) -> None:
    values = torch.full((2 * size,), value)
    groups = torch.arange(2 * size) // size
    assert group_stats(values, groups).constant.all()
    assert (group_stats(values, groups).std == 0).all()
    assert (group_normalize(values, groups) == 0).all()


def test_what_counts_as_constant_follows_the_magnitude() -> None:
    groups = torch.zeros(3, dtype=torch.long)
    near = torch.tensor([1000.0, 1000.0005, 1000.0], dtype=torch.float64)
    assert group_stats(near, groups).constant.all()
    assert not group_stats(near, groups, tol=1e-8).constant.any()
    assert not group_stats(near / 1000 * 1.00001 + torch.tensor([0, 1e-4, 0]), groups).constant.any()


def test_group_ids_may_be_scattered_and_of_any_number() -> None:
    values = torch.randn(9, dtype=torch.float64)
    groups = torch.tensor([50, -1, 50, 3, -1, 3, 50, 3, -1])
    order = torch.randperm(9)
    straight = group_normalize(values, groups)
    torch.testing.assert_close(group_normalize(values[order], groups[order]), straight[order])
    for group in (50, -1, 3):
        mine = values[groups == group]
        expected = (mine - mine.mean()) / (statistics.stdev(mine.tolist()) + 1e-4)
        torch.testing.assert_close(straight[groups == group], expected)


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group_ids must have shape \(4,\), got \(3,\)"):
        group_stats(torch.zeros(4, 2), torch.zeros(3, dtype=torch.long))


def test_no_rows_are_no_problem() -> None:
    assert group_normalize(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).shape == (0, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=12))
def test_pairs_are_those_of_two_loops(rows: list[tuple[int, bool]]) -> None:
    groups, keep = [row[0] for row in rows], [row[1] for row in rows]
    expected = [
        [i, j]
        for i in range(len(rows))
        for j in range(i + 1, len(rows))
        if groups[i] == groups[j] and keep[i] and keep[j]
    ]
    ids = torch.tensor(groups, dtype=torch.long)
    found = group_pairs(ids, torch.tensor(keep, dtype=torch.bool))
    assert found.shape == (len(expected), 2) and found.tolist() == expected
    assert group_pairs(ids).tolist() == group_pairs(ids, torch.ones(len(rows), dtype=torch.bool)).tolist()


def test_labels_and_the_parts_into_which_they_divide_groups() -> None:
    labels = label_ids(["b", None, frozenset("xy"), "b", frozenset("yx"), 1, 1.0])
    assert labels.tolist() == [0, -1, 1, 0, 1, 2, 2] and label_ids([None], missing=7).tolist() == [7]
    assert label_ids([]).shape == (0,)
    ids = subgroup_ids(torch.tensor([0, 0, 5, 5, 0, -1, -1]), torch.tensor([1, -1, 1, 1, 1, 1, 2]))
    assert ids[0] == ids[4] and ids[2] == ids[3] and len({*ids[[0, 1, 2]].tolist()}) == 3
    assert ids[5:].tolist() == [-1, -1], "rows that fill up a process stay apart from all groups"
