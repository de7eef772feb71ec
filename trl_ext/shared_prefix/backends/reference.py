"""`math`: attention in plain torch, on any device and in any dtype.

It is the reference for the other backends, and the only one on a CPU that has soft-capping.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..layout import CascadeLayout
from .interface import Backend, merge

# Queries whose scores exist at any one time. A full matrix of scores would be too large for long rows.
_QUERY_BLOCK = 512


class MathBackend(Backend):
    """Scores, softmax and its derivative written out. Half types are computed in float32.

    In the comments, `n` counts queries, `m` keys, and `r = H / Hkv` the query heads that read one key head.
    """

    name = "math"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Requires nothing but a floating-point dtype."""
        return None if dtype.is_floating_point else f"{dtype} is not a floating-point dtype."

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: CascadeLayout,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merges the attention of all blocks into an empty result. See `Backend.forward`."""
        dtype, (q, k, v) = q.dtype, _widened(q, k, v)
        # The log-sum-exp of no keys is -inf, which gives the first merge the full weight.
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
        for rows, keys, causal in _blocks(layout):
            scores, _ = _scores(q[rows], k[keys], scale, softcap, causal)  # (Hkv, r, n, m)
            block_lse = scores.logsumexp(-1)
            p = (scores - block_lse.unsqueeze(-1)).exp_()
            block_out = torch.einsum("hrnm,mhd->nhrd", p, v[keys])
            merge(out, lse, block_out.flatten(1, 2), block_lse.permute(2, 0, 1).flatten(1), rows)
        return out.to(dtype), lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: CascadeLayout,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes `P = exp(S - lse)` and `dS = P (dP - delta)` for each block, with `delta = sum(dout * out)`.

        As `lse` and `out` are the merged ones, the shares of the blocks add up to the exact gradients.
        """
        dtype, (dout, q, k, v, out) = q.dtype, _widened(dout, q, k, v, out)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        key_heads = k.shape[1]
        delta = (dout * out).sum(-1)  # (N, H)
        for rows, keys, causal in _blocks(layout):
            scores, slope = _scores(q[rows], k[keys], scale, softcap, causal)
            block_dout = dout[rows].unflatten(1, (key_heads, -1))  # (n, Hkv, r, D)
            p = (scores - _by_query(lse[rows], key_heads)).exp_()
            dv[keys] += torch.einsum("hrnm,nhrd->mhd", p, block_dout)
            dp = torch.einsum("nhrd,mhd->hrnm", block_dout, v[keys])
            ds = (dp - _by_query(delta[rows], key_heads)).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dq[rows] += torch.einsum("hrnm,mhd->nhrd", ds, k[keys]).flatten(1, 2).mul_(scale)
            dk[keys] += torch.einsum("hrnm,nhrd->mhd", ds, q[rows].unflatten(1, (key_heads, -1))).mul_(scale)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _widened(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Converts tensors of half types to float32."""
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def _by_query(x: torch.Tensor, key_heads: int) -> torch.Tensor:
    """Brings one value per query and head, (n, H), into the shape of the scores, (Hkv, r, n, 1)."""
    return x.unflatten(1, (key_heads, -1)).permute(1, 2, 0).unsqueeze(-1)


def _blocks(layout: CascadeLayout) -> Iterator[tuple[slice, slice, bool]]:
    """Yields query rows, key rows and whether the block is causal, in blocks of at most `_QUERY_BLOCK` queries."""
    for node_start, node_end in zip(layout.bounds, layout.bounds[1:], strict=False):
        for start in range(node_start, node_end, _QUERY_BLOCK):
            end = min(start + _QUERY_BLOCK, node_end)
            # The block sees the whole node before it, so its keys begin with the node.
            yield slice(start, end), slice(node_start, end), True
    for level in layout.crosses:
        for cross in level:
            for start in range(cross.q_start, cross.q_end, _QUERY_BLOCK):
                end = min(start + _QUERY_BLOCK, cross.q_end)
                yield slice(start, end), slice(cross.k_start, cross.k_end), False


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Computes the scores of a block, and with soft-capping their derivative by the uncapped scores.

    In a causal block, the last query sees all keys, the one before it all but the last key, and so on.

    Returns:
        (Hkv, r, n, m) and, with soft-capping, a second tensor of that shape.
    """
    scores = torch.einsum("nhrd,mhd->hrnm", q.unflatten(1, (k.shape[1], -1)), k).mul_(scale)
    slope = None
    if softcap is not None:
        tanh = torch.tanh(scores / softcap)
        scores, slope = tanh * softcap, 1 - tanh * tanh
    if causal:
        n, m = scores.shape[-2:]
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu_(m - n + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, slope
