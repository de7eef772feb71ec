"""VL-DAC: formulas against loops and the properties that they must have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.vl_dac.maths import (
    clipped_surrogate,
    explained_variance,
    first_tokens,
    gae,
    normalize,
    step_mean_weights,
    step_numbers,
    token_counts,
    value_loss,
)

SEEDS = st.integers(0, 2**31)

# --- GAE and normalisation --------------------------------------------------------------------------------------------


def buffer(seed: int, rows: int = 4, most: int = 6) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded with numbers that must not matter."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most + 1, (rows,), generator=draw)
    last = torch.arange(most) == (lengths - 1).unsqueeze(1)
    values = torch.randn(2, rows, most, generator=draw, dtype=torch.float64)
    limits = last & (torch.rand(rows, 1, generator=draw) < 0.4)
    return {
        "rewards": values[0],
        "values": values[1],
        "done": last,
        "truncated": limits,
        "bootstrap": torch.zeros(rows),
    }


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_gae_is_the_recursion(seed: int, gamma: float, lam: float, limits: bool) -> None:
    """Against a loop over one row at a time, which sees no padding."""
    made = buffer(seed)
    found, returns = gae(**made, gamma=gamma, gae_lambda=lam, time_limits=limits)
    for row, last in enumerate(made["done"].long().argmax(1).tolist()):
        ahead = following = 0.0
        for k in range(last, -1, -1):
            r, v = made["rewards"][row, k].item(), made["values"][row, k].item()
            following = r + gamma * ahead - v + gamma * lam * following
            if limits and made["truncated"][row, k]:
                following = 0.0
            assert found[row, k].item() == pytest.approx(following, abs=1e-9)
            assert returns[row, k].item() == pytest.approx(following + v, abs=1e-9)
            ahead = v


def test_the_two_ends_of_lambda() -> None:
    made = buffer(5) | {"truncated": torch.zeros(4, 6, dtype=torch.bool)}
    made["values"] = torch.zeros_like(made["values"])
    found, _ = gae(**made, gamma=1.0, gae_lambda=1.0)
    inside = made["done"].flip(1).cumsum(1).flip(1) > 0  # up to the last step
    to_go = torch.where(inside, made["rewards"], 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found[inside], to_go[inside])
    made = buffer(5) | {"truncated": torch.zeros(4, 6, dtype=torch.bool)}
    found, _ = gae(**made, gamma=0.9, gae_lambda=0.0)
    ahead = torch.where(made["done"], 0.0, torch.nn.functional.pad(made["values"], (0, 1))[:, 1:])
    torch.testing.assert_close(found, made["rewards"] + 0.9 * ahead - made["values"])


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_row_does_not_reach_another(seed: int) -> None:
    made = buffer(seed)
    before, _ = gae(**made, gamma=0.9, gae_lambda=0.8)
    made["rewards"] = made["rewards"].clone()
    made["rewards"][1] += 7
    after, _ = gae(**made, gamma=0.9, gae_lambda=0.8)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not torch.equal(before[1], after[1])


def test_a_step_at_a_limit_has_no_advantage() -> None:
    one = torch.ones(1, 2, dtype=torch.float64)
    last = torch.tensor([[False, True]])
    kept, returns = gae(one, 3 * one, last, last, torch.zeros(1), gamma=0.5, gae_lambda=0.5)
    assert kept.tolist() == [[1 + 0.5 * 3 - 3, 0.0]] and returns.tolist() == [[2.5, 3.0]]
    kept, returns = gae(one, 3 * one, last, last, torch.zeros(1), gamma=0.5, gae_lambda=0.5, time_limits=False)
    assert kept[0, 1] == -2 and returns[0, 1] == 1


def test_one_step_episodes_with_the_mean_as_value_are_a_batch_normalised_group() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.25]).double()
    ends = torch.ones(4, 1, dtype=torch.bool)
    mean = rewards.mean().expand(4)
    raw, _ = gae(rewards.unsqueeze(1), mean.unsqueeze(1), ends, ~ends, torch.zeros(4), gamma=0.99, gae_lambda=0.95)
    expected = group_normalize(rewards, torch.zeros(4).long(), eps=1e-8)
    torch.testing.assert_close(normalize(raw.flatten()), expected)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(0, 9))
def test_statistics_are_those_of_all_processes(seed: int, cut: int) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    parts = [values[:cut], values[cut:]]
    sums: list[list[torch.Tensor]] = [[], []]

    def total(own: torch.Tensor) -> torch.Tensor:  # what the first process sends is added to what the other one sent
        sums[0].append(own)
        return own + sums[1][len(sums[0]) - 1]

    mean = values.mean()
    other = parts[1]
    sums[1] = [torch.stack([torch.tensor(len(other)).double(), other.sum()]), ((other - mean) ** 2).sum()]
    found = normalize(parts[0], total)
    torch.testing.assert_close(found, ((values - mean) / (values.std() + 1e-8))[:cut])


def test_nothing_to_normalise() -> None:
    assert normalize(torch.zeros(0).double()).shape == (0,)
    assert normalize(torch.tensor([3.0]).double()).tolist() == [0.0]
    assert normalize(torch.tensor([0.1, 0.1 + 1e-9, 0.1 - 1e-9]).double()).tolist() == [0.0] * 3  # rounding


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0]).double()
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns, torch.full((3,), 9.0).double()) == pytest.approx(0)
    assert explained_variance(returns, -returns) == pytest.approx(-3)
    assert explained_variance(torch.ones(3).double(), returns).isnan()
    assert explained_variance(torch.zeros(0).double(), torch.zeros(0).double()).isnan()


# --- steps and their means --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=7, max_size=7), min_size=1, max_size=4))
def test_steps_are_the_maximal_runs(rows: list[list[int]]) -> None:
    step = step_numbers(torch.tensor(rows))
    counts, starts = token_counts(step), first_tokens(torch.tensor(rows))
    for row, own in enumerate(rows):
        number, inside = -1, False
        for token, value in enumerate(own):
            number += value == 1 and not inside
            assert step[row, token] == (number if value else -1)
            assert starts[row, token] == (value == 1 and not inside)
            inside = value == 1
        for k in range(number + 1):
            assert (counts[row][step[row] == k] == (step[row] == k).sum()).all()
    assert (counts[step < 0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_weights_turn_the_mean_over_tokens_into_a_mean_over_steps(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(4, 9, generator=draw) < 0.6).long()
    mask[0, 0] = 1
    values = torch.randn(4, 9, generator=draw, dtype=torch.float64)
    step = step_numbers(mask)
    means = [values[row][step[row] == k].mean() for row in range(4) for k in range(int(step[row].max()) + 1)]
    weight = step_mean_weights(step, mask.sum(), len(means))
    torch.testing.assert_close((weight * values).sum() / mask.sum(), torch.stack(means).mean())
    torch.testing.assert_close(weight[mask == 1].mean(), torch.tensor(1.0).double())
    assert (step_mean_weights(torch.full((2, 3), -1), 0, 0) == 0).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.01, 1))
def test_the_value_loss_is_never_below_the_square(seed: int, clip: float) -> None:
    now, old, returns = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed))
    square = (now - returns) ** 2
    assert (value_loss(now, old, returns, clip) >= square).all()
    assert torch.equal(value_loss(now, old, returns, None), square)
    assert torch.equal(value_loss(old, old, returns, clip), (old - returns) ** 2)


def test_clipping_and_its_guard_by_hand() -> None:
    ratio = torch.tensor([[1.5, 0.5, 20.0, 1.5, 0.5, 20.0]]).double()
    step = torch.tensor([[0, 0, -1, 1, 1, 1]])
    up, down = torch.ones(1, 6).double(), -torch.ones(1, 6).double()
    found = clipped_surrogate(ratio.log(), up, step, 0.1)
    torch.testing.assert_close(found, -torch.tensor([[1.1, 0.5, 1.1, 1.1, 0.9, 1.1]]).double())
    found = clipped_surrogate(ratio.log(), down, step, 0.1)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.9, 20.0, 1.1, 0.9, 1.1]]).double())
    found = clipped_surrogate(ratio.log(), down, step, 0.1, guard=None)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.9, 20.0, 1.5, 0.9, 20.0]]).double())
