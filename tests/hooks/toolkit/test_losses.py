"""Pieces of policy losses: means, gradients, and the clipped surrogate against a loop and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from trl_ext_hooks.toolkit.losses import (
    clipped_surrogate,
    importance_ratio,
    masked_mean,
    scale_gradient,
    sequence_log_ratio,
)


def test_masked_mean_is_a_loop_and_0_where_nothing_counts() -> None:
    values = torch.tensor([[1.0, 2.0, 30.0], [4.0, 50.0, 60.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 4.0, 0.0]
    assert masked_mean(values, mask).item() == pytest.approx(7 / 3)
    assert masked_mean(values, mask * 0).item() == 0


def test_a_scaled_gradient_leaves_the_values() -> None:
    values = torch.tensor([[1.0, -2.0], [3.0, 0.5]], requires_grad=True)
    factor = torch.tensor([[0.0], [3.0]])
    found = scale_gradient(values, factor)
    assert torch.equal(found, values) and scale_gradient(values, None) is values
    (found**2).sum().backward()
    assert torch.equal(values.grad, 2 * values.detach() * factor)


def surrogate(ratio: float, advantage: float, low: float, high: float, delta: float | None) -> float:
    free = ratio if delta is None else min(ratio, delta)
    return -min(free * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


@pytest.mark.parametrize("delta", [None, 3.0])
def test_the_clipped_surrogate_is_a_loop(delta: float | None) -> None:
    ratios, advantages = [0.1, 0.8, 1.0, 1.1, 1.4, 9.0], [-2.0, 0.0, 1.5]
    ratio = torch.tensor(ratios, dtype=torch.float64).repeat(3, 1)  # (3, 6)
    found = clipped_surrogate(ratio, torch.tensor(advantages, dtype=torch.float64).unsqueeze(1), 0.2, 0.28, delta)
    expected = [surrogate(r, a, 0.2, 0.28, delta) for a in advantages for r in ratios]
    assert found.flatten().tolist() == pytest.approx(expected)


def test_the_gradient_stops_where_the_ratio_is_clipped() -> None:
    """For a good token above the range and a bad one below it, unless the ratio has to come back."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0])
    clipped_surrogate(ratio, advantages, 0.2, 0.2).sum().backward()
    assert ratio.grad.tolist() == [0.0, 1.0, -1.0, 0.0, -2.0]


def test_the_dual_clip_bounds_a_ratio_that_exploded() -> None:
    ratio = torch.tensor([100.0], requires_grad=True)
    loss = clipped_surrogate(ratio, torch.tensor([-1.0]), 0.2, 0.2, 3.0)
    loss.sum().backward()
    assert loss.item() == 3.0 and ratio.grad.item() == 0.0


def test_importance_ratio_per_token_and_per_row() -> None:
    new, old = torch.tensor([[0.0, -1.0, -9.0]]), torch.tensor([[0.0, -2.0, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(importance_ratio(new, old, mask)[0, :2], torch.tensor([1.0, math.e]))
    torch.testing.assert_close(importance_ratio(new, old, mask, "sequence"), torch.tensor([[math.exp(0.5)]]))


def test_log_ratios_of_completions() -> None:
    """Of 3, 1 and no token; what is masked does not count."""
    logps = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    assert sequence_log_ratio(logps, logps - 0.5, mask).tolist() == [0.5, 0.5, 0.0]
    assert sequence_log_ratio(logps, logps - 0.5, mask, "sum").tolist() == [1.5, 0.5, 0.0]
