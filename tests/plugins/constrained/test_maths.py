"""The mathematics of constrained RLHF: multipliers, the mixture, and the sign and size of the dual step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_plugins.constrained.maths import Form, dual_step, mixed_advantages, multipliers, standardized

SEEDS = st.integers(0, 10_000)
FORMS: tuple[Form, ...] = ("equality", "inequality", "unsquashed")
ZERO = torch.zeros(2, dtype=torch.float64)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(FORMS), st.floats(0, 0.9), st.floats(0.05, 3))
def test_the_dual_step_is_sgd_of_torch(seed: int, form: Form, momentum: float, max_grad_norm: float) -> None:
    """Three steps on sum_k lambda_k * violation_k, differentiated and clipped by torch."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(3, generator=generator, dtype=torch.float64)
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=momentum)
    mu, velocity = start, torch.zeros_like(start)
    for _ in range(3):
        violations = torch.randn(3, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (multipliers(parameter, form) * violations).sum().backward()
        torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        optimizer.step()
        if form == "unsquashed":
            parameter.data.clamp_(min=0)
        mu, velocity = dual_step(
            mu, velocity, violations, form, momentum=momentum, max_grad_norm=max_grad_norm, learning_rate=0.1
        )
        torch.testing.assert_close(mu, parameter.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_above_the_threshold_weight_falls_and_at_it_stays(form: Form) -> None:
    mu = numbers(0.5, 0.5)
    after, velocity = dual_step(mu, ZERO, numbers(0.3, -0.3), form)
    before, weights = multipliers(mu, form), multipliers(after, form)
    assert weights[0] < before[0] and weights[1] > before[1]
    assert velocity[0] > 0 > velocity[1]
    still, _ = dual_step(mu, ZERO, ZERO, form)
    assert torch.equal(still, mu)


def test_only_equality_turns_a_reward_into_a_penalty() -> None:
    lowest = {}
    for form in FORMS:
        mu, velocity = ZERO, ZERO
        for _ in range(300):
            mu, velocity = dual_step(mu, velocity, numbers(1.0, 0.5), form, limit=2.0)
        lowest[form] = multipliers(mu, form).min().item()
        assert mu.abs().max() <= 2.0
    assert lowest["equality"] == pytest.approx(math.tanh(-2.0))
    assert 0 < lowest["inequality"] < 0.2 and lowest["unsquashed"] == 0.0


def test_a_reward_without_a_value_keeps_its_multiplier_and_leaves_the_others_alone() -> None:
    mu, velocity = numbers(0.5, -0.2), numbers(0.3, 0.1)
    after, moved = dual_step(mu, velocity, numbers(math.nan, 0.4), "equality")
    alone, moved_alone = dual_step(mu[1:], velocity[1:], numbers(0.4), "equality")
    assert after[0] == mu[0] and moved[0] == velocity[0]
    assert after[1] == alone[0] and moved[1] == moved_alone[0]


def test_multipliers_of_zero_leave_the_objective_only() -> None:
    objective, constrained = numbers(1.0, -1.0, 0.5), torch.tensor([[2.0, 3.0], [1.0, math.nan], [0.0, 1.0]])
    zero = numbers(0.0, 0.0)
    assert torch.equal(mixed_advantages(objective, constrained, zero, "equality"), 2 * objective)
    assert torch.equal(mixed_advantages(objective, constrained, zero, "unsquashed"), objective)
    mixed = mixed_advantages(objective, constrained, numbers(0.5, -0.25), "equality")
    assert mixed.tolist() == pytest.approx([1.75 + 1.0 - 0.75, -1.75 + 0.5, 0.875 - 0.25])


def test_standardising_leaves_missing_values_out() -> None:
    values = torch.tensor([[1.0, 5.0], [3.0, math.nan], [math.nan, 5.0]], dtype=torch.float64)
    expected = [[-(0.5**0.5), 0.0], [0.5**0.5, math.nan], [math.nan, 0.0]]
    for row, wanted in zip(standardized(values).tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6, nan_ok=True)
