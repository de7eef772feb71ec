"""Running moments: mean and deviation of all values that a run has seen so far."""

from __future__ import annotations

import torch

Moments = tuple[float, float, float]
"""Count, mean and sum of squared deviations of all values seen so far; zeros at first."""


def add_to_moments(moments: Moments, values: torch.Tensor) -> Moments:
    """Adds (n,) finite values to running moments (Chan's update of Welford's method)."""
    count, mean, squares = moments
    if not len(values):
        return moments
    values = values.double()
    total, delta = count + len(values), values.mean().item() - mean
    squares += ((values - values.mean()) ** 2).sum().item() + delta**2 * count * len(values) / total
    return total, mean + delta * len(values) / total, squares


def running_std(moments: Moments) -> float:
    """Returns the unbiased deviation, at least 1e-4; 1 before there are two values."""
    count, _, squares = moments
    return max((squares / (count - 1)) ** 0.5, 1e-4) if count > 1 else 1.0
