"""The mathematics of DeGRPO: the modes of answers, and weights that turn one mean over tokens into two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

Mode = Literal["think", "short"]


def read_mode(completion: Sequence[int], ids: Mapping[str, int]) -> tuple[Mode | None, int | None]:
    """Returns the mode of a completion, and the index at which its answer begins.

    The mode is the first token. A short answer follows at once, a long one behind the first `close`. Either result is
    None where it is missing.

    Args:
        completion: Token ids.
        ids: The ids of the tokens `think`, `short` and `close`.
    """
    first = completion[0] if completion else None
    if first == ids["short"]:
        return "short", 1
    if first == ids["think"]:
        return "think", completion.index(ids["close"]) + 1 if ids["close"] in completion else None
    return None, None


def control_tokens(
    completion_ids: torch.Tensor,
    loss_mask: torch.Tensor,
    ids: Sequence[int] | None = None,
    tool_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Marks the tokens that choose a mode.

    Args:
        completion_ids, loss_mask: (b, T).
        ids: Only these tokens count. None = the first token of a turn whatever it is.
        tool_mask: (b, T) 1 on the model's tokens: every turn of the model opens with a control token. None = the first
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
    """Returns weights w with sum(w l m) / N = alpha * mean of l over control tokens + mean of l over the others.

    w = alpha * N / N_ctl on control tokens and N / (N - N_ctl) on the others. A mean over nothing is 0.

    Args:
        control, mask: (b, T).
        n_control, n_tokens: N_ctl and N of all processes: what the trainer's token mean divides by.

    Returns:
        (b, T), 0 where the mask is 0.
    """
    return _weights(control, alpha, n_control.double(), n_tokens.double()) * mask


def sequence_mean_weights(control: torch.Tensor, mask: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns (b, T) weights whose mean over each row is alpha * (mean over its control tokens) + (over the others).

    The paper's form: w = alpha * L_i / C_i and L_i / (L_i - C_i), with L_i counted tokens and C_i control tokens of row
    i. Rows without one of the two have a mean of 0 there.
    """
    return _weights(control, alpha, control.sum(1, keepdim=True).double(), mask.sum(1, keepdim=True).double()) * mask


def _weights(control: torch.Tensor, alpha: float, n_control: torch.Tensor, n_tokens: torch.Tensor) -> torch.Tensor:
    """Returns alpha * N / N_ctl on control tokens and N / (N - N_ctl) on the others."""
    others = n_tokens - n_control
    return torch.where(control, alpha * n_tokens / n_control.clamp(min=1), n_tokens / others.clamp(min=1))
