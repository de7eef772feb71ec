"""The mathematics of DVAO: loops of the equation, its bound, invariants and NaN rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.dvao import dvao_advantages, spread_shares

SEEDS = st.integers(0, 10_000)


def batch(seed: int, groups: int = 5, size: int = 4, rewards: int = 3) -> tuple[torch.Tensor, ...]:
    """(rewards (N, K), weights (K,), group ids (N,)) without ties."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(groups * size, rewards, generator=generator, dtype=torch.float64)
    weights = 0.2 + torch.rand(rewards, generator=generator, dtype=torch.float64)
    return values, weights, torch.arange(groups * size) // size


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(2, 6), st.integers(1, 4))
def test_it_is_the_loop_of_the_definition(seed: int, groups: int, size: int, rewards: int) -> None:
    """Normalised advantages of every reward, weighed by its share of the spread, with an epsilon of almost 0."""
    values, weights, ids = batch(seed, groups, size, rewards)
    expected = []
    for n in range(len(values)):
        rows = [m for m in range(len(values)) if m // size == n // size]
        stds = [values[rows, k].std().item() for k in range(rewards)]
        total = sum(weights[k].item() * stds[k] for k in range(rewards))
        expected.append(
            sum(
                weights[k].item() * stds[k] / total * ((values[n, k] - values[rows, k].mean()).item() / stds[k])
                for k in range(rewards)
            )
        )
    assert dvao_advantages(values, weights, ids, eps=1e-12).tolist() == pytest.approx(expected, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(-10, 10))
def test_bound_sum_and_shift(seed: int, shift: float) -> None:
    values, weights, ids = batch(seed)
    ours = dvao_advantages(values, weights, ids)
    plain = group_normalize((values * weights).sum(1), ids)
    assert (ours.abs() <= plain.abs() * (1 + 1e-9)).all(), "never larger than the normalised sum"
    assert ours.view(5, 4).sum(1).abs().max() < 1e-9
    moved = values.clone()
    moved[:, 1] += shift
    torch.testing.assert_close(dvao_advantages(moved, weights, ids), ours)
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(dvao_advantages(values[rows], weights, ids[rows]), ours[rows])


def test_a_rescaled_reward_gains_weight() -> None:
    values, weights, ids = batch(1)
    louder = values.clone()
    louder[:, 1] *= 10
    before, after = (spread_shares(rewards, weights, ids) for rewards in (values, louder))
    assert (after[:, 1] > before[:, 1]).all() and (after.sum(1) < 1).all()


def test_one_reward_and_copies_of_it_are_grpo() -> None:
    values, _, ids = batch(2, rewards=1)
    plain = group_normalize(values[:, 0], ids, eps=1e-12)
    for copies in (1, 3):
        ours = dvao_advantages(values.expand(-1, copies), torch.ones(copies), ids, eps=1e-12)
        torch.testing.assert_close(ours, plain)


def test_rewards_without_signal_add_exactly_nothing() -> None:
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    constant = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    assert dvao_advantages(constant.unsqueeze(1), torch.ones(1), ids).tolist() == [0.0] * 6
    live = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    both = torch.stack([live, constant], dim=1)
    assert torch.equal(
        dvao_advantages(both, torch.ones(2), ids), dvao_advantages(live.unsqueeze(1), torch.ones(1), ids)
    )
    assert dvao_advantages(torch.tensor([[3.0]]), torch.ones(1), torch.tensor([0])).tolist() == [0.0]


def test_nan_rewards_are_left_out() -> None:
    ids = torch.tensor([0, 0, 0])
    rewards = torch.tensor([[1.0, math.nan], [3.0, math.nan], [math.nan, math.nan]])
    ours = dvao_advantages(rewards, torch.ones(2), ids, eps=1e-9)
    # mean 2, deviation sqrt(2): -1 / sqrt(2) and 1 / sqrt(2), and 0 for the row without rewards
    assert ours.tolist() == pytest.approx([-0.7071, 0.7071, 0], abs=1e-4)
