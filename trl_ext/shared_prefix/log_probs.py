"""Log-probabilities and entropies of tokens, computed from a model's own logits.

They serve models without TRL's fused head. On a CPU they can serve the others as well: there TRL's head runs without
its kernel, which takes two more projections than the plain head, and its temporaries set the peak of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Temporary probabilities that exist at any one time. A block this small stays in a processor's cache.
_BLOCK_ELEMENTS = 1 << 20


class _TokenLogProbs(torch.autograd.Function):
    """Keeps only the logits for the backward, and recomputes the probabilities block by block."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns log-probabilities and entropies of all rows."""
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty(len(labels), dtype=dtype)
        label_logits = torch.empty_like(lse)
        entropies = torch.empty_like(lse) if entropy else None
        for rows in _row_blocks(logits):
            z = _scaled(logits[rows], dtype, temperature)
            lse[rows] = z.logsumexp(-1)
            label_logits[rows] = z.gather(-1, labels[rows, None]).squeeze(-1)
            if entropies is not None:
                # H = lse - sum(p z), since log p = z - lse and the probabilities sum to 1.
                entropies[rows] = lse[rows] - ((z - lse[rows, None]).exp_() * z).sum(-1)
        ctx.save_for_backward(logits, labels, lse, *(() if entropies is None else (entropies,)))
        ctx.temperature = temperature
        return label_logits - lse, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dlogps: torch.Tensor | None, dentropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradient of the logits, and None for the other arguments."""
        logits, labels, lse, *entropies = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            log_p = _scaled(logits[rows], lse.dtype, ctx.temperature) - lse[rows, None]
            # With z the scaled logits, dlogp/dz = onehot - p and dH/dz = -p (log p + H).
            # Apart from the onehot, both are -p times a factor, so the factors are added up first.
            if dentropies is None:
                dz, factor = log_p.exp_(), None
            else:
                dz, factor = log_p.exp(), log_p.add_(entropies[0][rows, None]).mul_(dentropies[rows, None])
            if dlogps is not None:
                factor = dlogps[rows, None] if factor is None else factor.add_(dlogps[rows, None])
            # The division by the temperature is the chain rule from z back to the logits.
            dz = dz.zero_() if factor is None else dz.mul_(factor.div(-ctx.temperature))
            if dlogps is not None:
                dz.scatter_add_(-1, labels[rows, None], dlogps[rows, None].div(ctx.temperature))
            grad[rows] = dz
        return grad, None, None, None


def token_log_probs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the log-probability of each label and the entropy of each prediction, in float32 or wider.

    Args:
        logits: (M, V).
        labels: (M,).
        temperature: The logits are divided by it.
        entropy: Whether to return entropies.

    Returns:
        (M,) and (M,) or None, both differentiable once. Of tensors of size (M, V), only the logits are kept.
    """
    logps, entropies = _TokenLogProbs.apply(logits, labels, float(temperature), entropy)
    return logps, entropies


def _scaled(logits: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    """Returns the logits in a wider dtype, divided by the temperature."""
    logits = logits.to(dtype)
    return logits if temperature == 1 else logits / temperature


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    """Yields slices of rows that hold about `_BLOCK_ELEMENTS` logits each."""
    step = max(1, _BLOCK_ELEMENTS // logits.shape[-1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)
