"""SPAE: formulas against loops, figures by hand and the properties that they must have."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_plugins.spae.maths import (
    confidence,
    correctness,
    gains,
    outcome_advantages,
    saturated_before,
    saturation_factor,
    shaping,
    spae_advantages,
    step_of_tokens,
    step_potential,
)

NAN = math.nan
SEEDS = st.integers(0, 10_000)
UNIT = st.floats(0, 1)


def batch(seed: int, groups: int = 3, size: int = 4, most: int = 5) -> tuple[torch.Tensor, ...]:
    """(rewards (N,), group ids, potentials (N, K), token counts (N, K + 1)) with rows of 0 to K steps."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size
    rewards = torch.randint(0, 2, (rows,), generator=generator).double()
    rewards[0], rewards[1] = 0.0, 1.0  # one group at least is kept
    potential = 2 * torch.rand(rows, most, generator=generator, dtype=torch.float64) - 1
    steps = torch.randint(0, most + 1, (rows, 1), generator=generator)
    potential[torch.arange(most) >= steps] = NAN
    tokens = torch.randint(1, 6, (rows, most + 1), generator=generator)
    tokens[torch.arange(most + 1) >= steps.clamp(min=1)] = 0
    return rewards, torch.arange(rows) // size, potential, tokens


def finished(seed: int, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(advantages (N, K + 1), kept, token counts, outcome advantages)."""
    rewards, ids, potential, tokens = batch(seed)
    outcome, kept = outcome_advantages(rewards, ids)
    return spae_advantages(outcome, kept, potential, tokens, **settings), kept, tokens, outcome


# --- potentials -------------------------------------------------------------------------------------------------------


def phi(acc: float, conf: float) -> float:
    return step_potential(torch.tensor(acc).double(), torch.tensor(conf).double()).item()


@pytest.mark.parametrize(("acc", "conf", "expected"), [(1, 1, 1), (0, 1, -1), (0, 0, 0), (1, 0, 0.5)])
def test_corners(acc: float, conf: float, expected: float) -> None:
    assert phi(acc, conf) == pytest.approx(expected)


@settings(max_examples=100, deadline=None)
@given(UNIT, UNIT, st.floats(0.001, 0.5))
def test_the_potential_rises_with_acc_and_turns_with_conf(acc: float, conf: float, more: float) -> None:
    assert -1 <= phi(acc, conf) <= 1
    assert phi(min(acc + more, 1.0), conf) >= phi(acc, conf)
    change = phi(acc, min(conf + more, 1.0)) - phi(acc, conf)
    if acc < 2 / 3 - 1e-9:
        assert change <= 1e-12
    if acc > 2 / 3 + 1e-9:
        assert change >= -1e-12


def test_confidence_and_correctness() -> None:
    one, two, none = torch.tensor([0.1, 0.3]), torch.tensor([2.0]), torch.tensor([])
    assert confidence([one, two]) == pytest.approx((math.exp(-0.2) + math.exp(-2)) / 2)
    assert confidence([one, none]) == pytest.approx(math.exp(-0.2) / 2)  # an empty continuation is not sure of anything
    assert confidence([none, none]) == confidence([]) == 0.0
    assert correctness(torch.tensor([0.2, 0.9]).log()) == pytest.approx(0.55)
    assert phi(correctness(torch.tensor([0.4]).log()), 0.0) == pytest.approx(0.2)  # all empty: half of Acc


def test_gains() -> None:
    found = gains(torch.tensor([[0.5, 0.7, -0.1], [0.3, NAN, NAN], [NAN, NAN, NAN]]).double())
    torch.testing.assert_close(found[0], torch.tensor([0.0, 0.2, -0.8]).double())
    assert found[1, 0] == 0 and torch.isnan(found[1, 1:]).all() and torch.isnan(found[2]).all()
    assert gains(torch.zeros(2, 0)).shape == (2, 0)


# --- factors and bonuses ----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, UNIT)
def test_the_factor_is_1_up_to_the_first_saturated_step_and_falls_after_it(seed: int, alpha: float) -> None:
    potential = batch(seed)[2]
    factor = saturation_factor(potential, alpha=alpha, eps_sat=0.5)
    for row, values in zip(factor.tolist(), potential.tolist(), strict=True):
        first = next((k for k, value in enumerate(values) if value > 0.5), len(values))
        assert row[: first + 1] == [1.0] * (first + 1)
        assert all(a >= b for a, b in pairwise(row)) and min(row) >= 1 - alpha
        if first < len(values):
            assert row[first + 1] == pytest.approx(1 - alpha * (1 - math.exp(-1)))


def test_the_factor_counts_up() -> None:
    found = saturation_factor(torch.tensor([[0.95, 0.99, 0.2, 0.91]]), alpha=1.0)
    assert found[0].tolist() == pytest.approx([1, math.exp(-1), math.exp(-2), math.exp(-2), math.exp(-3)])


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_the_bonus_is_the_loop_of_the_formula(seed: int) -> None:
    rewards, ids, potential, _ = batch(seed)
    kept = outcome_advantages(rewards, ids)[1]
    found = shaping(potential, kept)
    steps = {
        (i, k): (potential[i, k] - potential[i, k - 1]).item() if k else 0.0
        for i in range(len(kept))
        for k in range(potential.shape[1])
        if kept[i] and not torch.isnan(potential[i, k])
    }
    if not steps:
        assert (found == 0).all()
        return
    lowest, highest = min(steps.values()), max(steps.values())
    grown = {key: math.exp((value - lowest) / max(highest - lowest, 1e-8)) for key, value in steps.items()}
    mean = sum(grown.values()) / len(grown)
    for i, k in ((i, k) for i in range(len(kept)) for k in range(potential.shape[1] + 1)):
        assert found[i, k].item() == pytest.approx(grown[i, k] - mean if (i, k) in grown else 0.0, abs=1e-12)
    assert found.sum().item() == pytest.approx(0.0, abs=1e-9)


def test_equal_gains_give_no_bonus() -> None:
    potential = torch.tensor([[0.3, NAN], [0.9, NAN]]).double()
    assert (shaping(potential, torch.ones(2).bool()) == 0).all()
    assert (shaping(torch.full((2, 2), NAN), torch.ones(2).bool()) == 0).all()
    assert (shaping(torch.tensor([[0.1, 0.9]]), torch.zeros(1).bool()) == 0).all()


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 19), max_size=8), st.integers(1, 20), st.sampled_from(["last", "next"]))
def test_steps_partition_the_completion(ends: set[int], length: int, tail: Any) -> None:
    own = sorted(end for end in ends if end < length)
    found = step_of_tokens(own, length, tail).tolist()
    for token, step in enumerate(found):
        expected = sum(end < token for end in own)
        assert step == (expected if tail == "next" else min(expected, max(len(own) - 1, 0)))
    assert all(b - a in (0, 1) for a, b in pairwise(found)) and (not found or found[0] == 0)


# --- advantages -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, UNIT, UNIT)
def test_the_batch_is_standard_over_its_tokens(seed: int, alpha: float, xi: float) -> None:
    values, kept, tokens, _ = finished(seed, alpha=alpha, xi=xi)
    assert (values[~kept] == 0).all()
    every = values[kept].repeat_interleave(1).repeat_interleave(tokens[kept].flatten())
    assert every.mean().item() == pytest.approx(0, abs=1e-9)
    assert every.std().item() == pytest.approx(1, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_without_penalty_and_bonus_it_is_the_normalised_mean_baseline(seed: int) -> None:
    values, kept, tokens, outcome = finished(seed, alpha=0.0, xi=0.0)
    repeated = outcome[kept].repeat_interleave(tokens[kept].sum(1))
    expected = (outcome - repeated.mean()) / (repeated.std() + 1e-8)
    for row in torch.nonzero(kept).flatten():
        torch.testing.assert_close(values[row], expected[row].expand_as(values[row]))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(-5, 5))
def test_a_constant_on_the_rewards_of_a_group_changes_nothing(seed: int, constant: float) -> None:
    rewards, ids, potential, tokens = batch(seed)
    moved = rewards + constant * (ids == 0)
    one, other = (spae_advantages(*outcome_advantages(values, ids), potential, tokens) for values in (rewards, moved))
    torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_damping_and_bonus_by_hand() -> None:
    """A right row that checks after it knows, and a wrong one that is sure of nothing."""
    potential = torch.tensor([[0.0, 0.95, 0.95], [0.0, 0.0, NAN]]).double()
    tokens = torch.tensor([[2, 2, 2, 0], [3, 3, 0, 0]])
    values = spae_advantages(torch.tensor([0.5, -0.5]).double(), torch.ones(2).bool(), potential, tokens)
    raw = torch.tensor([[0.5, 0.5, 0.5 * (1 - 0.5 * (1 - math.exp(-1)))], [-0.5, -0.5, -0.5]]).double()
    grown = torch.tensor([1.0, math.e, 1.0, 1.0, 1.0]).double()
    bonus = grown - grown.mean()
    raw += 0.5 * torch.stack([bonus[:3], torch.tensor([bonus[3], bonus[4], 0.0])])
    every = torch.cat([raw[0].repeat_interleave(2), raw[1, :2].repeat_interleave(3)])
    torch.testing.assert_close(values[0, :3], (raw[0] - every.mean()) / (every.std() + 1e-8))
    assert values[0, 1] > values[0, 0] > values[0, 2] > 0 > values[1, 0]


def test_filtered_and_unknown_rows_are_in_no_statistic() -> None:
    rewards, ids, potential, tokens = batch(3)
    rewards[4:8] = 1.0
    rewards[9] = NAN
    outcome, kept = outcome_advantages(rewards, ids)
    assert kept.tolist() == [True] * 4 + [False] * 4 + [True, False, True, True] and (outcome[~kept] == 0).all()
    values = spae_advantages(outcome, kept, potential, tokens)
    expected = spae_advantages(outcome[kept], kept[kept], potential[kept], tokens[kept])
    torch.testing.assert_close(values[kept], expected)
    assert (values[~kept] == 0).all()
    both, all_kept = outcome_advantages(rewards, ids, filter_zero_variance=False)
    assert all_kept.tolist() == [True] * 9 + [False] + [True] * 2 and (both[4:8] == 0).all()
    shaped = spae_advantages(both, all_kept, potential, tokens)
    assert (shaped[4:8] != 0).any()  # trained on shaping alone


def test_nothing_to_normalise() -> None:
    potential, none = torch.full((2, 1), NAN).double(), torch.zeros(2).bool()
    tokens = torch.tensor([[1, 0], [0, 0]])
    outcome = torch.tensor([0.5, -0.5]).double()
    assert (spae_advantages(outcome, none, potential, tokens) == 0).all()  # all groups filtered
    assert (spae_advantages(outcome, ~none, potential, tokens) == 0).all()  # one token
    assert (spae_advantages(outcome, ~none, potential, torch.tensor([[3, 0], [0, 0]])) == 0).all()  # all the same


def test_saturated_steps_are_counted_up() -> None:
    potential = torch.tensor([[0.95, 0.2, 0.91], [0.99, NAN, NAN], [NAN, NAN, NAN]]).double()
    assert saturated_before(potential, 0.9).tolist() == [[0, 1, 1, 2], [0, 1, 1, 1], [0, 0, 0, 0]]
    assert saturated_before(torch.zeros(2, 0), 0.9).shape == (2, 1)
