"""Mathematics of constrained RLHF: multipliers, mixed advantages and the dual update (arXiv 2310.04373).

K constrained rewards have dual variables mu and multipliers lambda, both (K,) float64.
"""

from __future__ import annotations

from typing import Literal

import torch

Form = Literal["equality", "inequality", "unsquashed"]


def multipliers(mu: torch.Tensor, form: Form) -> torch.Tensor:
    """Returns the weights lambda of the dual variables mu (K,): tanh(mu), sigmoid(mu), or mu itself."""
    if form == "unsquashed":
        return mu
    return mu.tanh() if form == "equality" else mu.sigmoid()


def mixed_advantages(
    objective: torch.Tensor, constrained: torch.Tensor, weights: torch.Tensor, form: Form
) -> torch.Tensor:
    """Weighs the advantages of K constrained rewards against those of the objective.

    Args:
        objective: (N,) A_0, in the paper of the KL to the reference.
        constrained: (N, K) A_k. A NaN entry adds 0.
        weights: (K,) lambda.
        form: Squashed multipliers share a weight of K with the objective, others are added to it.

    Returns:
        (N,) (K - sum_k lambda_k) A_0 + sum_k lambda_k A_k, or A_0 + sum_k lambda_k A_k without squashing.
    """
    share = 1.0 if form == "unsquashed" else len(weights) - weights.sum()
    return share * objective + (weights * constrained).nansum(dim=1)


def dual_step(
    mu: torch.Tensor,
    velocity: torch.Tensor,
    violations: torch.Tensor,
    form: Form,
    *,
    learning_rate: float = 0.1,
    momentum: float = 0.1,
    max_grad_norm: float = 0.5,
    limit: float = torch.inf,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes one step of SGD on sum_k lambda_k * violation_k, so that a reward above its threshold loses weight.

    Args:
        mu: (K,) dual variables.
        velocity: (K,) momentum of earlier steps.
        violations: (K,) mean reward - threshold. A NaN entry, of a reward that applied to no row, is not updated.
        form: How multipliers follow from mu.
        learning_rate, momentum, max_grad_norm: Of SGD, with the norm over all K.
        limit: Largest magnitude of mu. Without squashing mu is also at least 0.

    Returns:
        mu and velocity after the step.
    """
    weights = multipliers(mu, form)
    slope = {"equality": 1 - weights**2, "inequality": weights * (1 - weights), "unsquashed": torch.ones_like(mu)}[form]
    known = ~violations.isnan()
    gradient = torch.where(known, slope * violations, 0.0)
    gradient = gradient * (max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)  # as torch clips
    moved = momentum * velocity + gradient
    after = (mu - learning_rate * moved).clamp(0.0 if form == "unsquashed" else -limit, limit)
    return torch.where(known, after, mu), torch.where(known, moved, velocity)


def standardized(values: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Returns (value - mean) / (std + eps) over the rows of (N,) or (N, K); NaN entries stay out."""
    count = (~values.isnan()).sum(dim=0)
    centred = values - values.nanmean(dim=0)
    std = (centred.square().nansum(dim=0) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + eps)
