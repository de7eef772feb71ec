"""TRL's advantages for groups of any size. TRL itself computes them in a matrix of groups by `num_generations` rows."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_hooks import TrainerKind
from trl_ext_hooks.toolkit.groups import group_stats

_EPS = 1e-4  # TRL's


def group_advantages(
    trainer: Any,
    kind: TrainerKind,
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group_ids: torch.Tensor,
    kl: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the advantages of a round, as the trainer's settings ask for them, and the rows of groups without spread.

    Args:
        trainer: The trainer.
        kind: GRPO or RLOO.
        rewards: (N, F) rewards of all processes. A row of NaN has the advantage 0 and is in no statistic.
        weights: (F,).
        group_ids: (N,).
        kl: (N,) the KL term of RLOO, which is a part of its rewards.

    Returns:
        (N,) advantages, and (N,) booleans: whether the rewards of the row's group have no spread.
    """
    values = rewards.double()
    unscorable = values.isnan().all(dim=1)
    total = (values * weights.double()).nansum(dim=1).masked_fill(unscorable, torch.nan)
    if kind == "rloo":
        advantages, std = _leave_one_out(trainer, total, group_ids, kl)
    elif trainer.multi_objective_aggregation == "normalize_then_sum":
        stats = group_stats(values, group_ids)
        normalised = (values - stats.mean) / (stats.std + _EPS)
        total = (normalised * weights.double()).nansum(dim=1).masked_fill(unscorable, torch.nan)
        std = _std(total).expand_as(total)
        advantages = (total - total.nanmean()) / (std + _EPS)
    else:
        stats = group_stats(total, group_ids)
        std = _std(total).expand_as(total) if trainer.scale_rewards == "batch" else stats.std
        advantages = total - stats.mean
        if trainer.scale_rewards != "none":
            advantages = advantages / (std + _EPS)
    silent = torch.isclose(std, torch.zeros_like(std))
    return advantages.nan_to_num(nan=0.0).to(rewards.dtype), silent


def _leave_one_out(
    trainer: Any, total: torch.Tensor, group_ids: torch.Tensor, kl: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns RLOO's advantages (N,), NaN where there is none, and the deviation of each row's group."""
    if trainer.reward_clip_range:
        total = total.clamp(*trainer.reward_clip_range)
    if kl is not None:
        total = total - trainer.beta * kl
    stats = group_stats(total, group_ids)
    # the mean of the others; a row alone in its group has none
    others = (stats.count * stats.mean - total) / (stats.count - 1)
    advantages = (total - others).masked_fill(stats.count <= 1, torch.nan)
    if trainer.normalize_advantages:
        advantages = (advantages - advantages.nanmean()) / (_std(advantages) + _EPS)
    return advantages, stats.std


def _std(values: torch.Tensor) -> torch.Tensor:
    """Returns the standard deviation of what is not NaN, 0 for fewer than two values."""
    known = values[~values.isnan()]
    return known.std() if len(known) > 1 else values.new_zeros(())
