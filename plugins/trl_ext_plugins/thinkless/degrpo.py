"""The mathematics of DeGRPO: two means, over control tokens and over all others, as weights on token advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def control_tokens(
    completion_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    ids: Sequence[int] | None = None,
    tool_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which tokens choose a mode.

    Args:
        completion_ids, loss_mask: (b, T).
        ids: Only these tokens count; None = the first token of a turn whatever it is.
        tool_mask: (b, T) 1 on the model's tokens: every turn of the model opens with a control token; None = the first
            token of the completion only.

    Returns:
        (b, T) bool, false where the loss counts nothing.
    """
    opens = torch.zeros_like(loss_mask, dtype=torch.bool)
    opens[:, :1] = True
    if tool_mask is not None:
        opens[:, 1:] |= (tool_mask[:, 1:] == 1) & (tool_mask[:, :-1] == 0)
    if ids is not None:
        opens &= torch.isin(completion_ids, torch.tensor(list(ids), device=completion_ids.device))
    return opens & (loss_mask == 1)


def token_mean_weights(
    control: torch.Tensor, mask: torch.Tensor, alpha: float, n_control: torch.Tensor, n_tokens: torch.Tensor
) -> torch.Tensor:
    """Weights w with sum(w l m) / N = alpha * mean of l over control tokens + mean of l over the others.

    w = alpha * N / N_ctl on control tokens and N / (N - N_ctl) on the others; a mean over nothing is 0.

    Args:
        control, mask: (b, T).
        n_control, n_tokens: N_ctl and N of all processes: what the trainer's token mean divides by.

    Returns:
        (b, T), 0 where the mask is 0.
    """
    total, on = n_tokens.double(), n_control.double()
    weight = torch.where(control, alpha * total / on.clamp(min=1), total / (total - on).clamp(min=1))
    return weight * mask


def sequence_mean_weights(control: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """The paper's form: weights whose mean over each row is alpha * (mean over its control tokens) + (over the others).

    w = alpha * L_i / C_i and L_i / (L_i - C_i) with L_i counted tokens and C_i control tokens of row i; (b, T).
    """
    length, on = mask.sum(1, keepdim=True).double(), control.sum(1, keepdim=True).double()
    weight = torch.where(control, alpha * length / on.clamp(min=1), length / (length - on).clamp(min=1))
    return weight * mask


def clipped_surrogate(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)) with rho = exp(logps - old_logps); (m, T)."""
    ratio = torch.exp(logps - old_logps)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
