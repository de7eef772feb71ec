"""Cascade attention: exact attention over a packed row, as one differentiable function.

Every node of the tree attends causally to itself, and all its descendants attend to it in one call without a mask.
What a token collects in its calls, `(o_i, lse_i)`, merges exactly:

    lse = logaddexp_i(lse_i),    o = sum_i exp(lse_i - lse) o_i.

The backward of one call needs `P = exp(S - lse)` and `delta = sum(do * o)` and nothing else of the forward. Handed the
merged `o` and `lse`, each call therefore returns its own share of the gradients, and they add up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .backends import Backend
from .layout import CascadeLayout


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: CascadeLayout,
        backend: Backend,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        out, lse = backend.forward(q, k, v, layout, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (layout, backend, scale, softcap)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        layout, backend, scale, softcap = ctx.call
        dq, dk, dv = backend.backward(dout, q, k, v, out, lse, layout, scale, softcap)
        return dq, dk, dv, None, None, None, None


def cascade_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: CascadeLayout,
    backend: Backend,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of every packed token to itself and its ancestors.

    Args:
        q: (N, H, D) queries in packed order.
        k: (N, Hkv, D) keys; `H` is a multiple of `Hkv`, query head `h` reads key head `h // (H / Hkv)`.
        v: (N, Hkv, Dv) values, no wider than the keys.
        layout: Where the nodes lie.
        backend: See `backends.choose_backend`.
        scale: Factor of the scores, `D ** -0.5` if None.
        softcap: Scores become `softcap * tanh(score / softcap)`.

    Returns:
        (N, H, Dv), differentiable once by `q`, `k` and `v`. Under autocast it computes in autocast's type.
    """
    n, width = layout.length, v.shape[-1]
    if q.dim() != 3 or k.shape[:2] != v.shape[:2] or {q.shape[0], k.shape[0]} != {n} or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"cascade_attention expects q (N, H, D), k (N, Hkv, D) and v (N, Hkv, Dv) with N = {n}, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if width > q.shape[-1]:
        raise ValueError(f"cascade_attention wants values no wider than keys, got {width} and {q.shape[-1]}.")
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
    if dtype != v.dtype and v.dtype == torch.float64:
        dtype = v.dtype  # autocast leaves float64 alone
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    v = nn.functional.pad(v, (0, q.shape[-1] - width)) if width < q.shape[-1] else v
    return _Cascade.apply(q.to(dtype), k.to(dtype), v.to(dtype), layout, backend, scale, softcap)[..., :width]
