"""Formulas of VL-DAC: GAE over steps, clipping per token, value loss, and means over steps.

Axes: `R` rows (episodes), `K` steps of a row, padded right, `T` completion tokens. `step` (R, T) holds the number of
each token's step in its row, -1 on tokens of none. Sources: arXiv 2508.04280 and the authors' code
(a2c_ppo_acktr/storage.py, algo/ppo.py); where they differ, `trl_ext_plugins.vl_dac` says which one is followed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from trl_ext_hooks.toolkit import losses

CONSTANT = 1e-6
"""A deviation below this, relative to the mean (at least 1), is rounding: the values are equal."""

# --- steps ------------------------------------------------------------------------------------------------------------


def first_tokens(mask: torch.Tensor) -> torch.Tensor:
    """Returns (R, T) bool: where a run of ones begins."""
    inside = mask != 0
    inside_before = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return inside & ~inside_before


def step_numbers(mask: torch.Tensor) -> torch.Tensor:
    """Numbers the maximal runs of ones in each row.

    Args:
        mask: (R, T), 1 on tokens that the model wrote.

    Returns:
        (R, T) int64: 0, 1, ... on the runs, -1 elsewhere.
    """
    return torch.where(mask != 0, first_tokens(mask).long().cumsum(1) - 1, -1)


def any_in_step(flags: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """Returns (R, T) bool: tokens of a step in which some token is flagged; False on tokens of none."""
    inside, index = step >= 0, step.clamp(min=0)
    flagged = torch.zeros_like(step).scatter_add_(1, index, (flags & inside).long())
    return (flagged.gather(1, index) > 0) & inside


def token_counts(step: torch.Tensor) -> torch.Tensor:
    """Returns n_k, (R, T) int64: how many tokens the step of each token has; 0 on tokens of none."""
    inside, index = (step >= 0).long(), step.clamp(min=0)
    return torch.zeros_like(step).scatter_add_(1, index, inside).gather(1, index) * inside


def step_mean_weights(step: torch.Tensor, items: torch.Tensor | float, steps: torch.Tensor | float) -> torch.Tensor:
    """Returns N / (S n_k), which turns a mean over all N tokens into a mean over S steps of their means over tokens.

    Args:
        step: (R, T).
        items: N, by which the trainer divides.
        steps: S of all processes; 0 gives weights of 0.

    Returns:
        (R, T) float64, 0 on tokens of no step.
    """
    counts = token_counts(step).double()
    scale = torch.as_tensor(items, dtype=torch.float64, device=step.device) / max(float(steps), 1.0)
    return torch.where(counts > 0, scale / counts.clamp(min=1), 0.0)


# --- advantages -------------------------------------------------------------------------------------------------------


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    done: torch.Tensor,
    truncated: torch.Tensor,
    bootstrap: torch.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    time_limits: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes generalised advantages over environment steps, backwards.

    delta_k = r_k + gamma V_{k+1} (1 - d_k) - V_k
    A_k = (delta_k + gamma lambda (1 - d_k) A_{k+1}) (1 - x_k),  R_k = A_k + V_k.

    With lambda = 1 this is the discounted return minus the value; lambda = 0 leaves the error of one step.

    Args:
        rewards, values: (R, K) r and V.
        done: (R, K) bool d: the episode ended with this step.
        truncated: (R, K) bool x: it was ended by a limit. Its reward is not used: A = 0 and R = V.
        bootstrap: (R,) V after the last step, where that one is not done.
        gamma: Discount per step.
        gae_lambda: lambda.
        time_limits: Whether x counts; without it a limit is an end like any other.

    Returns:
        A and R, (R, K) each. What lies behind a step with d = 1 does not reach it, so rows may be padded there.
    """
    advantages = torch.zeros_like(values)
    next_advantage, next_value = torch.zeros_like(bootstrap), bootstrap
    for k in reversed(range(values.shape[1])):
        goes_on = (~done[:, k]).to(values.dtype)
        delta = rewards[:, k] + gamma * next_value * goes_on - values[:, k]
        next_advantage = delta + gamma * gae_lambda * goes_on * next_advantage
        if time_limits:
            next_advantage = torch.where(truncated[:, k], 0.0, next_advantage)
        advantages[:, k] = next_advantage
        next_value = values[:, k]
    return advantages, advantages + values


def normalize(
    values: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums, eps: float = 1e-8
) -> torch.Tensor:
    """Returns (A - mean) / (std + eps) over the steps of all processes, std with ddof 1.

    Args:
        values: (S,) float64 A of this process's steps; may be empty.
        total: Adds a tensor over processes. Called twice.
        eps: Added to the standard deviation.

    Returns:
        (S,); exactly 0 where there is one step in all, or where all are equal up to rounding.
    """
    count, summed = total(torch.stack([values.new_tensor(len(values)), values.sum()]))
    mean = summed / count.clamp(min=1)
    squares = total(((values - mean) ** 2).sum())
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    if count <= 1 or std <= CONSTANT * mean.abs().clamp(min=1):
        return torch.zeros_like(values)
    return (values - mean) / (std + eps)


def explained_variance(
    returns: torch.Tensor, values: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums
) -> torch.Tensor:
    """Returns 1 - Var(R - V) / Var(R) over the steps of all processes; 0-d, NaN where the returns do not vary.

    1 = the value predicts the returns, 0 = it is no better than their mean.

    Args:
        returns, values: (S,) float64 of this process.
        total: Adds a tensor over processes. Called twice.
    """
    both = torch.stack([returns, returns - values])  # (2, S)
    sums = total(torch.cat([both.sum(1), returns.new_tensor([float(len(returns))])]))
    mean = sums[:2] / sums[2].clamp(min=1)
    variance = total(((both - mean.unsqueeze(1)) ** 2).sum(1))
    return torch.where(variance[0] > CONSTANT**2 * sums[2], 1 - variance[1] / variance[0], torch.nan)


# --- losses -----------------------------------------------------------------------------------------------------------


def clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, step: torch.Tensor, eps: float, guard: float | None = 10.0
) -> torch.Tensor:
    """Returns max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) per token.

    Args:
        log_ratio: (R, T) log rho = log pi - log pi_old.
        advantages: (R, T) A, constants.
        step: (R, T).
        eps: Clip range.
        guard: In a step with any rho above it, every token has the clipped term alone. Otherwise a ratio that exploded
            would multiply a negative advantage without a bound. None = off.
    """
    ratio = log_ratio.exp()
    surrogate = losses.clipped_surrogate(ratio, advantages, eps, eps)
    if guard is None:
        return surrogate
    clipped_only = -advantages * ratio.clamp(1 - eps, 1 + eps)
    return torch.where(any_in_step(ratio > guard, step), clipped_only, surrogate)


def kl_to_reference(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """Returns k3 = exp(ref - lp) - (ref - lp) - 1 per token, at least 0."""
    difference = ref_logps - logps
    return difference.exp() - difference - 1


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Returns max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2), or the first alone where `clip` is None.

    Args:
        values, old, returns: One shape: V now, V when the round was sampled, and R. Only `values` has a gradient.
        clip: How far V may move.
    """
    error = (values - returns) ** 2
    if clip is None:
        return error
    near_old = old + (values - old).clamp(-clip, clip)
    return torch.maximum(error, (near_old - returns) ** 2)
