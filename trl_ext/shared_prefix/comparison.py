"""Comparison of two results of one model: log-probabilities and gradients, within the tolerance of their dtype."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from .model_parts import ModelParts

# Tolerances for the differences of log-probabilities and of gradients. Half types round differently on two paths, and
# the router of a mixture may then send a token to other experts. So in half types an average is compared, relative to
# how much the values vary.
TOLERANCES = {
    torch.float64: (1e-5, 1e-4),  # not tighter, as the fused head computes in float32
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.05, 0.1),
    torch.float16: (0.02, 0.05),
}
_HALF = (torch.bfloat16, torch.float16)
_COMPARED_PARAMETERS = 8
_LARGEST_PARAMETER = 1 << 24
_LARGEST_VECTOR = 1 << 16

Gradients = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Result:
    """Log-probabilities, detached, gradients of some parameters, and the coarsest dtype that took part."""

    values: torch.Tensor
    gradients: Gradients
    dtype: torch.dtype


def tolerances(dtype: torch.dtype) -> tuple[float, float]:
    """Returns the tolerances of a dtype, for log-probabilities and for gradients."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Returns the dtype of fewer bits."""
    return min((first, second), key=lambda dtype: torch.finfo(dtype).bits)


def same(first: Result, second: Result, slack: float = 1.0) -> bool:
    """Returns whether two results agree within the tolerances, multiplied by `slack`."""
    dtype = coarser(first.dtype, second.dtype)
    allowed_logps, allowed_gradients = tolerances(dtype)
    gradients = gradient_difference(first.gradients, second.gradients, dtype)
    return logp_difference(first.values, second.values, dtype) <= allowed_logps * slack and (
        gradients is None or gradients <= allowed_gradients * slack
    )


def compared_parameters(model_parts: ModelParts) -> list[nn.Parameter]:
    """Returns trainable parameters: a few that are spread over the model, and one vector of each kind.

    Kinds are told apart by the name inside a layer, such as `self_attn.q_norm.weight`. Sharded models have none.
    """
    if model_parts.is_sharded:
        return []
    trainable = [
        (name, parameter)
        for name, parameter in model_parts.causal_lm.named_parameters()
        if parameter.requires_grad and parameter.numel() <= _LARGEST_PARAMETER
    ]
    step = max(1, len(trainable) // _COMPARED_PARAMETERS)
    chosen = dict(trainable[::step])
    kinds = {
        re.sub(r"\d+", "", name): name
        for name, parameter in trainable
        if parameter.dim() == 1 and parameter.numel() <= _LARGEST_VECTOR
    }
    chosen |= {name: parameter for name, parameter in trainable if name in kinds.values()}
    return list(chosen.values())


def gradients(logps: torch.Tensor, weights: torch.Tensor, parameters: list[nn.Parameter]) -> Gradients:
    """Returns the gradients of the weighted log-probabilities, None for a parameter without influence."""
    if not parameters:
        return ()
    return torch.autograd.grad((logps * weights).sum(), parameters, allow_unused=True)


def logp_difference(first: torch.Tensor, second: torch.Tensor, dtype: torch.dtype) -> float:
    """Returns the largest difference, or in half types the mean difference by the deviation of the second values."""
    difference = (first - second).abs()
    return float(difference.mean() / second.std() if dtype in _HALF else difference.max())


def gradient_difference(first: Gradients, second: Gradients, dtype: torch.dtype) -> float | None:
    """Returns the largest difference of a gradient by the largest gradient, or in half types the same of their norms.

    The second gradients are the ones to divide by. None if there is none to compare.
    """
    pairs = [(a.float(), b.float()) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    order = 2.0 if dtype in _HALF else torch.inf
    difference, size = (
        float(torch.stack([torch.linalg.vector_norm(x, order) for x in tensors]).norm(order))
        for tensors in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return difference / max(size, 1e-30)
