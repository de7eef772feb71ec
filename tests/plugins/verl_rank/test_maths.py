"""The mathematics of VERL rank shaping: ranks by another way, loops of the definition, and its bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_plugins.verl_rank import effective_rank, moved, prefix_ranks, rank_changes, rank_signal, shaped

SEEDS = st.integers(0, 10_000)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 12), st.integers(2, 12))
def test_the_rank_is_that_of_the_singular_values(seed: int, length: int, size: int) -> None:
    states = noise(seed, length, size)
    values = torch.linalg.svdvals(states - states.mean(0))
    share = (values / values.sum()).clamp(min=1e-300)
    assert effective_rank(states).item() == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=1e-6)


@pytest.mark.parametrize(("length", "size"), [(40, 5), (5, 40)])
def test_known_ranks(length: int, size: int) -> None:
    line = noise(1, length, 1) @ noise(2, 1, size)
    assert effective_rank(line).item() == pytest.approx(1, abs=1e-12)
    assert effective_rank(line.float()).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(length, size)).item() == 1 and effective_rank(line[:1]).item() == 0
    assert effective_rank(1e-6 * line + 5).item() == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.full((3, 2), math.nan)).isnan()
    # an orthogonal basis beside its negative is centred, and all of its directions weigh the same
    basis = torch.linalg.qr(noise(3, size, size)).Q
    assert effective_rank(torch.cat([basis, -basis])).item() == pytest.approx(size, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 14), st.integers(1, 4))
def test_velocity_and_acceleration_are_loops_of_the_definition(seed: int, length: int, stride: int) -> None:
    states, earlier, velocities = noise(seed, length, 6), [], []
    for t in range(stride, length, stride):
        rank = effective_rank(states[: t + 1]).item()
        if earlier:
            velocities.append(rank - sum(earlier) / len(earlier))
        earlier.append(rank)
    steps = [after - before for before, after in itertools.pairwise(velocities)]
    expected = [sum(values) / len(values) if values else 0.0 for values in (velocities, steps)]
    assert [value.item() for value in rank_changes(prefix_ranks(states, stride))] == pytest.approx(expected, abs=1e-9)
    assert length > 2 * stride or expected == [0, 0]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.1, 10), st.floats(0.1, 5))
def test_the_bonus_has_bounds(seed: int, kappa: float, gain: float) -> None:
    advantages = noise(seed, 9)
    advantages[0] = 0
    explore, signal = rank_signal(3 * noise(seed + 1, 9, 3), noise(seed + 2, 3), gain=gain)
    after = shaped(advantages, signal, kappa=kappa)
    assert (after >= advantages).all() and ((after - advantages) <= advantages.abs() / kappa + 1e-12).all()
    assert after[0] == 0 and ((explore >= 0) & (explore <= 1)).all() and signal.abs().max() <= 1
    assert torch.equal(shaped(advantages, -signal.abs(), kappa=kappa), advantages)


def test_the_acceleration_decides() -> None:
    averages = torch.tensor([2.0, 1.0, 0.1], dtype=torch.float64)
    wide, fast = [4.0, 0.0], [0.0, 3.0]  # a high rank that does not grow, and a low one that does
    rows = torch.tensor([[*wide, 9.0], [*wide, -9.0], [*fast, 9.0], [*fast, -9.0], [2.0, 1.0, 0.1]])
    explore, signal = rank_signal(rows.double(), averages)
    assert explore.tolist() == pytest.approx([1, 0, 1, 0, 0.5], abs=1e-4)
    assert (signal > 0.7).tolist() == [True, False, False, True, False] and signal[4] == 0


def test_one_signal_per_row_reaches_every_token() -> None:
    tokens = torch.tensor([[1.0, -0.5, 0.0], [2.0, 0.2, 0.0]])
    after = shaped(tokens, torch.tensor([[0.3], [-1.0]], dtype=torch.float64), kappa=2.0)
    torch.testing.assert_close(after, torch.tensor([[1.3, -0.25, 0.0], [2.0, 0.2, 0.0]]))


def test_running_averages() -> None:
    measures = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    assert moved([0.0, 1.0, 2.0], measures, 0.25) == pytest.approx([0.5, 1.5, 2.5])
