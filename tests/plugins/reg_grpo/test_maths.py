"""The mathematics of Reg-GRPO: loops of the definition, what a perfect fit is, invariances and the first step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.reg_grpo import TINY, group_deviation, predicted_advantages, regression_losses

SEEDS = st.integers(0, 10_000)


def batch(seed: int, groups: int = 3, size: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log-ratios, standardised advantages, group ids), (N,) each."""
    generator = torch.Generator().manual_seed(seed)
    rho, rewards = torch.randn(2, groups * size, generator=generator, dtype=torch.float64)
    ids = torch.arange(groups * size) // size
    return rho.requires_grad_(), group_normalize(rewards, ids), ids


def loss_of(rho: torch.Tensor, advantages: torch.Tensor, ids: torch.Tensor, **options: float) -> torch.Tensor:
    predicted = predicted_advantages(rho, ids, **options)
    return regression_losses(predicted, advantages, ids).sum() / len(ids.unique())


def gradient(rho: torch.Tensor, advantages: torch.Tensor, ids: torch.Tensor, **options: float) -> torch.Tensor:
    return torch.autograd.grad(loss_of(rho, advantages, ids, **options), rho)[0]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(2, 6))
def test_it_is_the_loop_of_the_definition(seed: int, groups: int, size: int) -> None:
    rho, advantages, ids = batch(seed, groups, size)
    expected = 0.0
    for start in range(0, len(rho), size):
        values = rho[start : start + size]
        mean, std = sum(values) / size, values.std()
        errors = [(a - (v - mean) / (std + 1e-4)) ** 2 for a, v in zip(advantages[start:], values, strict=False)]
        expected += sum(errors) / size / groups
    torch.testing.assert_close(loss_of(rho, advantages, ids), expected)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_rows_in_any_order_and_groups_of_any_size(seed: int) -> None:
    rho, advantages, _ = batch(seed)
    ids = torch.tensor([0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    mixed = gradient(rho[order].detach().requires_grad_(), advantages[order], ids[order])
    torch.testing.assert_close(mixed, gradient(rho, advantages, ids)[order])


@given(SEEDS, st.floats(0.1, 10), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_log_ratios_that_are_affine_in_the_advantages_cost_nothing(seed: int, factor: float, shift: float) -> None:
    _, advantages, ids = batch(seed)
    rho = (factor * advantages + shift).requires_grad_()
    assert loss_of(rho, advantages, ids, eps=1e-9) < 1e-6
    assert gradient(rho, advantages, ids, eps=1e-9).abs().max() < 2e-3 / factor
    assert loss_of((-rho).detach(), advantages, ids, eps=1e-9) > 2  # the other way round, every error is twice A


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_constant_per_group_changes_nothing(seed: int) -> None:
    rho, advantages, ids = batch(seed)
    moved = (rho + torch.tensor([5.0, -2.0, 0.3])[ids]).detach().requires_grad_()
    torch.testing.assert_close(gradient(moved, advantages, ids), gradient(rho, advantages, ids))


@pytest.mark.parametrize(("floor", "divisor"), [(0.0, 1e-4), (1e-2, 1e-2 + 1e-4), (5.0, 5.0 + 1e-4)])
def test_the_first_step_follows_the_advantages(floor: float, divisor: float) -> None:
    """Without any log-ratio, the gradient is -2 A / (N * (floor + eps)), which a floor keeps small."""
    _, advantages, ids = batch(1)
    rho = torch.zeros(12, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(gradient(rho, advantages, ids, std_floor=floor), -2 * advantages / (12 * divisor))
    assert group_deviation(rho.detach(), ids).tolist() == [TINY] * 12


def test_a_floor_above_the_deviation_divides_by_itself() -> None:
    rho, _, ids = batch(2)
    centred = rho - rho.view(3, 4).mean(1)[ids]
    torch.testing.assert_close(predicted_advantages(rho, ids, std_floor=9.0, eps=1e-9), centred / 9)
    free = predicted_advantages(rho, ids, std_floor=0.1)
    torch.testing.assert_close(free, predicted_advantages(rho, ids))


def test_groups_without_a_preference_are_dropped() -> None:
    rho, advantages, ids = batch(3)
    constant = torch.where(ids == 1, 0.7, advantages)
    found = gradient(rho, constant, ids)
    assert (found[4:8] == 0).all() and (found[:4] != 0).all() and (found[8:] != 0).all()
    torch.testing.assert_close(found[:4], gradient(rho, advantages, ids)[:4])  # the group stays in the divisor
    alone = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert gradient(alone, torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)).tolist() == [0.0]
    empty = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    total = regression_losses(predicted_advantages(empty, empty.long()), empty, empty.long()).sum()
    assert total.item() == 0 and total.requires_grad
