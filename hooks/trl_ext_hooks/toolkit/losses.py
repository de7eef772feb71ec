"""Pieces of policy losses: the clipped surrogate, weighted gradients and masked means."""

from __future__ import annotations

import torch


def scale_gradient(values: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """Returns the same values with their gradient multiplied by `factor`, which may broadcast; None leaves it alone."""
    if factor is None:
        return values
    constant = values.detach()
    return constant + factor * (values - constant)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Averages the `values` where `mask` is 1, over `dim` or everything; gives 0 where nothing is counted."""
    dims = tuple(range(values.dim())) if dim is None else dim
    return (values * mask).sum(dims) / mask.sum(dims).clamp(min=1)


def sequence_log_ratio(
    logps: torch.Tensor, other_logps: torch.Tensor, mask: torch.Tensor, reduction: str = "mean"
) -> torch.Tensor:
    """Returns log pi - log pi_other of completions, the mean over their counted tokens: (m, T) each -> (m,).

    With the reduction `"sum"` it is their sum. A completion without a token gives 0.
    """
    difference = logps - other_logps
    return masked_mean(difference, mask, dim=1) if reduction == "mean" else (difference * mask).sum(dim=1)


def importance_ratio(
    per_token_logps: torch.Tensor, old_per_token_logps: torch.Tensor, mask: torch.Tensor, level: str = "token"
) -> torch.Tensor:
    """Returns rho = exp(log pi - log pi_old) of every token (m, T).

    With the level `"sequence"` it is (m, 1): exp of the mean difference over the row's counted tokens.
    """
    difference = per_token_logps - old_per_token_logps
    return torch.exp(difference if level == "token" else masked_mean(difference, mask, dim=1).unsqueeze(1))


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, delta: float | None = None
) -> torch.Tensor:
    """Returns the loss -min(min(rho, delta) * A, clip(rho, 1 - low, 1 + high) * A) of PPO, one value per entry.

    Args:
        ratio: rho, the policy over the sampling policy; (m, T) per token or (m, 1) per row.
        advantages: A, constants; (m, 1) or (m, T).
        low, high: Clip range, such as `loss.clip_range`.
        delta: Upper bound of the unclipped ratio, which caps the loss where A < 0 (dual clip). None bounds nothing.
    """
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    return -torch.min(bounded * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
