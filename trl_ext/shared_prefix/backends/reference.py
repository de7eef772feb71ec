"""`math`: plain torch, any device and type. The reference, and the only one that knows soft-capping on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..layout import CascadeLayout
from . import Backend, merge

_QUERIES = 512  # rows of the score matrix that exist at a time


class MathBackend(Backend):
    """Scores, softmax and its derivative written out. Half types compute in float32."""

    name = "math"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Runs everywhere."""
        return None if dtype.is_floating_point else f"{dtype} is no floating type."

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: CascadeLayout,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.forward`."""
        given, (q, k, v) = q.dtype, _wide(q, k, v)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
        for rows, keys, causal in _calls(layout):
            scores = _scores(q[rows], k[keys], scale, softcap, causal)[0]  # (Hkv, r, n, m)
            part_lse = scores.logsumexp(-1)
            part = torch.einsum("hrnm,mhd->nhrd", (scores - part_lse.unsqueeze(-1)).exp_(), v[keys])
            merge(out, lse, part.flatten(1, 2), part_lse.permute(2, 0, 1).flatten(1), rows)
        return out.to(given), lse

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
        """`P = exp(S - lse)`, `dS = P (dP - delta)` with `delta = sum(dout * out)`; exact by the merged `lse`."""
        given, (dout, q, k, v, out) = q.dtype, _wide(dout, q, k, v, out)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        groups = k.shape[1]
        delta = (dout * out).sum(-1)
        for rows, keys, causal in _calls(layout):
            scores, slope = _scores(q[rows], k[keys], scale, softcap, causal)
            d = dout[rows].unflatten(1, (groups, -1))  # (n, Hkv, r, D)
            p = (scores - lse[rows].unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1)).exp_()
            dv[keys] += torch.einsum("hrnm,nhrd->mhd", p, d)
            ds = torch.einsum("nhrd,mhd->hrnm", d, v[keys])
            ds = (ds - delta[rows].unflatten(1, (groups, -1)).permute(1, 2, 0).unsqueeze(-1)).mul_(p)
            if slope is not None:
                ds.mul_(slope)
            dq[rows] += torch.einsum("hrnm,mhd->nhrd", ds, k[keys]).flatten(1, 2).mul_(scale)
            dk[keys] += torch.einsum("hrnm,nhrd->mhd", ds, q[rows].unflatten(1, (groups, -1))).mul_(scale)
        return dq.to(given), dk.to(given), dv.to(given)


def _wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def _calls(layout: CascadeLayout) -> Iterator[tuple[slice, slice, bool]]:
    """Query rows, key rows and whether causal, in blocks of queries."""
    for start, end in zip(layout.bounds, layout.bounds[1:], strict=False):
        for at in range(start, end, _QUERIES):
            to = min(at + _QUERIES, end)
            yield slice(at, to), slice(start, to), True
    for level in layout.crosses:
        for cross in level:
            for at in range(cross.q_start, cross.q_end, _QUERIES):
                yield slice(at, min(at + _QUERIES, cross.q_end)), slice(cross.k_start, cross.k_end), False


def _scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float | None, causal: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores (Hkv, r, n, m) and, with soft-capping, their derivative by the uncapped ones.

    A causal block's last query sees all keys; the one before it all but the last, and so on.
    """
    scores = torch.einsum("nhrd,mhd->hrnm", q.unflatten(1, (k.shape[1], -1)), k).mul_(scale)
    slope = None
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = bent * softcap, 1 - bent * bent
    if causal:
        n, m = scores.shape[-2:]
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu_(m - n + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores, slope


BACKEND = MathBackend()
