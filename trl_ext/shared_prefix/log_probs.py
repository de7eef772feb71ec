"""Log-probabilities and entropies from a model's own logits.

For models without TRL's fused head, and on a CPU for all: there TRL's head runs without its kernel, in two projections
more than the plain one, and its temporaries are the peak of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_BLOCK = 1 << 20  # temporary probabilities that exist at a time; few enough to stay in a processor's cache


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty(len(labels), dtype=wide)
        picked, entropies = torch.empty_like(lse), torch.empty_like(lse) if entropy else None
        for rows in _blocks(logits):
            z = _scaled(logits[rows], wide, temperature)
            lse[rows] = z.logsumexp(-1)
            picked[rows] = z.gather(-1, labels[rows, None]).squeeze(-1)
            if entropies is not None:
                entropies[rows] = lse[rows] - ((z - lse[rows, None]).exp_() * z).sum(-1)
        ctx.save_for_backward(logits, labels, lse, *(() if entropies is None else (entropies,)))
        ctx.temperature = temperature
        return picked - lse, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, dlogps: torch.Tensor | None, dentropies: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        logits, labels, lse, *entropies = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _blocks(logits):
            log_p = _scaled(logits[rows], lse.dtype, ctx.temperature) - lse[rows, None]
            # dlogp/dz = onehot - p and dH/dz = -p (log p + H): both are -p times a factor, but for the onehot.
            if dentropies is None:
                dz, factor = log_p.exp_(), None
            else:
                dz, factor = log_p.exp(), log_p.add_(entropies[0][rows, None]).mul_(dentropies[rows, None])
            if dlogps is not None:
                factor = dlogps[rows, None] if factor is None else factor.add_(dlogps[rows, None])
            dz = dz.zero_() if factor is None else dz.mul_(factor.div(-ctx.temperature))
            if dlogps is not None:
                dz.scatter_add_(-1, labels[rows, None], dlogps[rows, None].div(ctx.temperature))
            grad[rows] = dz
        return grad, None, None, None


def _scaled(logits: torch.Tensor, dtype: torch.dtype, temperature: float) -> torch.Tensor:
    logits = logits.to(dtype)
    return logits if temperature == 1 else logits / temperature


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    step = max(1, _BLOCK // logits.shape[-1])
    for at in range(0, len(logits), step):
        yield slice(at, at + step)


def log_probs(
    logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each label, and the entropy of each prediction, in float32 or wider.

    Args:
        logits: (M, V).
        labels: (M,).
        temperature: The logits are divided by it.
        entropy: Whether to return entropies.

    Returns:
        (M,) and (M,) or None, both differentiable. Of size (M, V) only the logits are kept.
    """
    logps, entropies = _LogProbs.apply(logits, labels, float(temperature), entropy)
    return logps, entropies
