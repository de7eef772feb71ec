"""The mathematics of dynamic reward weighting: volumes by counting cells, and invariants of both ways."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.dynamic_weights.maths import (
    clipped_gradients,
    contribution,
    front,
    hypervolume,
    influences,
    moved_weights,
    multiplier,
    single_advantages,
)

POINTS = st.integers(1, 4).flatmap(
    lambda size: st.lists(st.lists(st.integers(-2, 4), min_size=size, max_size=size), min_size=1, max_size=6)
)


def tensor(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(POINTS)
def test_the_volume_counts_cells(points: list[list[int]]) -> None:
    """Cells between 0 and 4 that lie below a point; coordinates below the reference count as the reference."""
    size = len(points[0])
    cells = itertools.product(range(4), repeat=size)
    covered = sum(any(all(c < p for c, p in zip(cell, point, strict=True)) for point in points) for cell in cells)
    assert hypervolume(points, [0] * size) == covered
    assert hypervolume(points[::-1], [0] * size) == covered
    turned = [point[1:] + point[:1] for point in points]
    assert hypervolume(turned, [0] * size) == covered
    assert hypervolume(front(points), [0] * size) == covered


def test_a_front_has_no_point_that_another_one_covers() -> None:
    points = [[1, 1], [2, 0], [0, 2], [1, 1], [2, 1], [0, 0]]
    assert front(points) == [[0, 2], [2, 1]]


def test_what_does_not_extend_the_front_adds_exactly_nothing() -> None:
    archive = [[0.1, 0.7], [0.3, 0.55], [0.62, 0.21]]
    for point in (*archive, [0.29, 0.5], [-3.0, 0.7], [-1.0, -1.0]):
        assert contribution(point, archive, [0.0, 0.0]) == 0.0
    assert multiplier(0.0) == 0.5
    assert contribution([0.3, 0.56], archive, [0.0, 0.0]) == pytest.approx(0.2 * 0.01)


def test_the_factor_grows_with_the_contribution() -> None:
    factors = [multiplier(gain) for gain in (0.0, 0.01, 0.3, 1.0, 5.0)]
    assert factors == sorted(set(factors)) and factors[0] == 0.5 and factors[-1] < 2


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_weights_add_up_and_follow_the_influence(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(size, 7, generator=generator, dtype=torch.float64)
    weights = torch.rand(size, generator=generator, dtype=torch.float64) + 0.1
    weights /= weights.sum()
    influence = influences(gradients)
    expected = [sum((a * b).sum().item() for b in gradients) for a in gradients]
    assert influence.tolist() == pytest.approx(expected)
    after = moved_weights(weights, influence, 0.01)
    assert after.sum().item() == pytest.approx(1) and (after > 0).all()
    # ratios of weights move in the order of the influences
    assert (after / weights).argsort().tolist() == influence.argsort().tolist()
    torch.testing.assert_close(moved_weights(weights, influence, 0.0), weights)


def test_known_weights() -> None:
    even = tensor(0.5, 0.5)
    assert moved_weights(even, influences(torch.eye(2, dtype=torch.float64)), 3.0).tolist() == [0.5, 0.5]
    three = torch.full((3,), 1 / 3, dtype=torch.float64)
    opposed = moved_weights(three, influences(tensor([1.0, 0.2], [1.0, -0.2], [-1.0, 0.0])), 0.1)
    assert opposed[2] < 1 / 3 < opposed[0]
    gone = moved_weights(tensor(0.0, 0.4, 0.6), tensor(9.0, 0.0, 0.0), 1.0)
    assert gone.tolist() == pytest.approx([0, 0.4, 0.6])


def test_long_gradients_are_cut() -> None:
    gradients = tensor([3.0, 4.0], [0.3, 0.4], [0.0, 0.0])
    assert clipped_gradients(gradients, 1.0).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.3, 0.4], [0, 0]]
    for nothing in (None, 0.0):
        assert torch.equal(clipped_gradients(gradients, nothing), gradients)


def test_advantages_of_single_rewards() -> None:
    rewards = torch.tensor([[1.0, 5.0], [0.0, 5.0], [0.0, 7.0], [1.0, math.nan], [3.0, 1.0], [0.0, 2.0]])
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    group = single_advantages(rewards, ids)
    torch.testing.assert_close(group[:, 0], group_normalize(rewards[:, 0], ids))
    assert group[3, 1] == 0 and torch.isfinite(group).all()
    plain = single_advantages(rewards, ids, scale="none")
    assert plain[:3, 0].tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    spread = rewards[:, 0].std().item() + 1e-4
    torch.testing.assert_close(single_advantages(rewards, ids, scale="batch")[:, 0], plain[:, 0] / spread)
    others = single_advantages(rewards, ids, scale="none", leave_one_out=True)
    assert others[:3, 0].tolist() == pytest.approx([1.0, -0.5, -0.5])  # minus the mean of the other two
    assert others[4:, 1].tolist() == pytest.approx([-1, 1])  # two rows to which the reward applies
