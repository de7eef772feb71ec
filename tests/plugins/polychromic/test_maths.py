"""The mathematics of polychromic sets: enumerated sets, invariants, and groups of any size."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.polychromic import UNNAMED, polychromic_advantages, set_scores


def advantages(rewards: torch.Tensor, strategies: torch.Tensor, ids: torch.Tensor, size: int) -> torch.Tensor:
    return polychromic_advantages(rewards, set_scores(rewards, strategies, ids, size))


def enumerated(rewards: list[float], strategies: list[int], size: int) -> tuple[float, list[float]]:
    """The mean score of all sets of a group, and of those that hold each row, as the definition says."""
    rows = [row for row in range(len(rewards)) if not math.isnan(rewards[row])]
    scores = {
        chosen: sum(rewards[row] for row in chosen) / size * len({strategies[row] for row in chosen} - {UNNAMED}) / size
        for chosen in itertools.combinations(rows, size)
    }
    if not scores:
        return 0.0, [0.0] * len(rewards)
    mean = sum(scores.values()) / len(scores)
    held = [[score for chosen, score in scores.items() if row in chosen] for row in range(len(rewards))]
    return mean, [sum(values) / len(values) if values else mean for values in held]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(1, 5))
def test_it_is_the_mean_over_all_sets(seed: int, sizes: list[int], size: int) -> None:
    """Groups of different sizes whose rows are mixed, rows without a reward, and rows without a strategy."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(sizes)
    rewards = torch.randn(count, generator=draw, dtype=torch.float64)
    rewards[torch.rand(count, generator=draw) < 0.15] = math.nan
    strategies = torch.randint(-1, 3, (count,), generator=draw)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mixed = torch.randperm(count, generator=draw)
    rewards, strategies, ids = rewards[mixed], strategies[mixed], ids[mixed]
    ours = advantages(rewards, strategies, ids, size)
    scores = set_scores(rewards, strategies, ids, size)
    for group in range(len(sizes)):
        rows = (ids == group).nonzero().flatten()
        mean, own = enumerated(rewards[rows].tolist(), strategies[rows].tolist(), size)
        assert ours[rows].tolist() == pytest.approx([value - mean for value in own], abs=1e-10)
        real = rows[scores.in_sets[rows]]
        assert scores.all_sets[real].tolist() == pytest.approx([mean] * len(real), abs=1e-10)
        assert abs(ours[rows].sum().item()) < 1e-10


def test_large_groups_are_exact() -> None:
    """1,820 sets; and a group of which nobody could list all sets."""
    draw = torch.Generator().manual_seed(3)
    rewards, strategies = torch.randn(16, generator=draw).double(), torch.randint(0, 5, (16,), generator=draw)
    mean, own = enumerated(rewards.tolist(), strategies.tolist(), 4)
    ours = advantages(rewards, strategies, torch.zeros(16, dtype=torch.int64), 4)
    assert ours.tolist() == pytest.approx([value - mean for value in own], abs=1e-12)
    # 256 copies of the same rows are drawn nearly independently, so one row more of a strategy hardly matters
    many = advantages(rewards.repeat(256), strategies.repeat(256), torch.zeros(4096, dtype=torch.int64), 4)
    assert many.isfinite().all() and abs(many.sum()) < 1e-9
    torch.testing.assert_close(many[:16], many[16:32])


def test_one_strategy_is_a_multiple_of_the_centred_reward() -> None:
    rewards, ids = torch.randn(12, dtype=torch.float64), torch.arange(12) // 6
    ours = advantages(rewards, torch.zeros(12, dtype=torch.int64), ids, 3)
    centred = group_normalize(rewards, ids, scale=False)
    # mean over the sets with a row: 1/n of its reward, and the others as often as (n - 1) / (G - 1) says
    torch.testing.assert_close(ours, centred * (1 / 3) * (1 / 3) * (1 - 2 / 5))


def test_sets_of_one_are_the_centred_reward() -> None:
    rewards, ids = torch.randn(10), torch.arange(10) // 5
    ours = advantages(rewards, torch.randint(0, 3, (10,)), ids, 1)
    torch.testing.assert_close(ours, group_normalize(rewards, ids, scale=False))
    assert ours.dtype == rewards.dtype


def test_a_rare_right_strategy_beats_a_common_one() -> None:
    rewards = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    ours = advantages(rewards, torch.tensor([0, 0, 0, 1, 0, 2]), torch.zeros(6, dtype=torch.int64), 2)
    assert ours[3] > ours[0] == ours[1] == ours[2] > 0 > ours[4]
    assert ours[5] > ours[4], "a wrong answer of a rare strategy costs less than one of the common strategy"


def test_no_strategy_adds_nothing() -> None:
    rewards, ids = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    unnamed = advantages(rewards, torch.tensor([0, 0, 1, UNNAMED]), ids, 2)
    named = advantages(rewards, torch.tensor([0, 0, 1, 2]), ids, 2)
    assert unnamed[3] < named[3] and unnamed[2] > unnamed[0]
    nobody = set_scores(rewards, torch.full((4,), UNNAMED), ids, 2)
    assert nobody.own_sets.tolist() == [0.0] * 4


@pytest.mark.parametrize("strategies", [[0, 0, 0, 0, 0], [0, 1, 2, 3, 4], [0, 0, 1, 1, 2]])
def test_without_signal_it_is_exactly_zero(strategies: list[int]) -> None:
    ids, labels = torch.zeros(5, dtype=torch.int64), torch.tensor(strategies)
    assert advantages(torch.zeros(5), labels, ids, 3).tolist() == [0.0] * 5
    right = advantages(torch.full((5,), 0.7), labels, ids, 3)
    assert (right == 0).all() == (len(set(strategies)) in (1, 5)), "where all are right, only strategies count"


def test_groups_that_hold_one_set_or_none() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, math.nan, 0.0])
    ids, labels = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    assert advantages(rewards, labels, ids, 3).tolist() == [0.0] * 6
    assert set_scores(rewards, labels, ids, 3).in_sets.tolist() == [True] * 3 + [False] * 3
