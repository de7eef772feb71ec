"""Cascade attention: exact attention over a packed row, as one differentiable function.

A token attends to the earlier tokens of its own node and to all tokens of the nodes above (see `layout`). These keys
are served in several calls without a mask: each node attends causally to itself, and all descendants of a node attend
to that node in one further call. Call `i` gives a token an output `o_i` and the log-sum-exp `lse_i` of its scores.
They merge to exactly the softmax over all keys:

    lse = logaddexp_i(lse_i)
    o   = sum_i exp(lse_i - lse) o_i

In the backward, a call needs the probabilities `P = exp(S - lse)` of its scores `S`, and `delta = sum(do * o)` for each
query. With the merged `lse` and `o`, these are the probabilities and the `delta` of the softmax over all keys. So each
call returns its own share of the gradients, and the shares add up to the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .backends import Backend
from .layout import CascadeLayout


class _CascadeAttention(torch.autograd.Function):
    """Connects a backend's forward and backward to autograd."""

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
        """Returns the merged output, and keeps it with its log-sum-exp for the backward."""
        # The inputs already have the dtype to compute in. Autocast would change the dtypes that a backend chooses.
        with torch.autocast(q.device.type, enabled=False):
            out, lse = backend.forward(q, k, v, layout, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = (layout, backend, scale, softcap)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of the three tensors, and None for the other arguments."""
        q, k, v, out, lse = ctx.saved_tensors
        layout, backend, scale, softcap = ctx.call
        with torch.autocast(q.device.type, enabled=False):
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
    """Computes the attention of every packed token to itself and its ancestors.

    Args:
        q: (N, H, D) queries in packed order.
        k: (N, Hkv, D) keys. `H` is a multiple of `Hkv`, and query head `h` reads key head `h // (H / Hkv)`.
        v: (N, Hkv, Dv) values.
        layout: Where the nodes lie.
        backend: The kernels, see `backends.choose_backend`.
        scale: Factor of the scores, `D ** -0.5` if None.
        softcap: If given, scores become `softcap * tanh(score / softcap)`.

    Returns:
        (N, H, Dv), differentiable once by `q`, `k` and `v`. Under autocast it is computed in autocast's dtype.
    """
    n, value_width, key_width = layout.length, v.shape[-1], q.shape[-1]
    if q.dim() != 3 or k.shape[:2] != v.shape[:2] or {q.shape[0], k.shape[0]} != {n} or key_width != k.shape[-1]:
        raise ValueError(
            f"cascade_attention expects q (N, H, D), k (N, Hkv, D) and v (N, Hkv, Dv) with N = {n}, got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
    if v.dtype == torch.float64:
        dtype = v.dtype  # autocast leaves float64 alone
    scale = key_width**-0.5 if scale is None else scale
    # The kernels take values as wide as keys. Zeros that widen queries and keys change no score, and zeros that widen
    # values add columns of zeros to the output, which are cut off again.
    if value_width < key_width:
        v = nn.functional.pad(v, (0, key_width - value_width))
    elif value_width > key_width:
        q, k = (nn.functional.pad(x, (0, value_width - key_width)) for x in (q, k))
    out = _CascadeAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), layout, backend, scale, softcap)
    return out[..., :value_width]
