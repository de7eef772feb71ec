"""`aten`: torch's own flash attention operators for the CPU.

The operators want as many key heads as query heads. Keys are given as views that repeat without copying: either the
key heads are the batch and the query heads of one key head its heads, or, for several nodes of equal length, the
nodes are the batch and one call serves one key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layout import CascadeLayout
from . import Backend, merge

_HALF = (torch.bfloat16, torch.float16)


class AtenBackend(Backend):
    """CPU flash attention; float32 and bfloat16."""

    name = "aten"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Needs the CPU, float32 or bfloat16, and scores that are not capped."""
        if device.type != "cpu":
            return f"its operators are for the CPU, the model is on {device}."
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32 or bfloat16, not {dtype}."
        if softcap:
            return "its operators know no soft-capping of the attention scores."
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} has no flash attention operators for the CPU."
        return None

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
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for call in _calls(layout, k.shape[1]):
            queries = call.queries(q)
            keys, values = _repeat(call.keys(k), queries), _repeat(call.keys(v), queries)
            part, part_lse = _forward(queries, keys, values, call.causal, scale)
            if call.causal:  # these calls come first, and each token is in exactly one of them
                call.queries(out).copy_(part)
                call.queries(lse).copy_(part_lse)
            else:
                merge(out, lse, _rows(part), _rows(part_lse), call.q)
        return out, lse

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
        """Every call gets the merged `out` and `lse` and so returns its exact share of the gradients."""
        given = q.dtype
        if given in _HALF:
            # The operator's backward in half types is many times slower than in float32 where the processor has no
            # instructions for them, and less exact where it has.
            dout, q, k, v, out = dout.float(), q.float(), k.float(), v.float(), out.float()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for call in _calls(layout, k.shape[1]):
            queries = call.queries(q)
            keys, values = _repeat(call.keys(k), queries), _repeat(call.keys(v), queries)
            merged = call.queries(out), call.queries(lse)
            parts = _backward(call.queries(dout), queries, keys, values, *merged, call.causal, scale)
            for x, part in (
                (call.queries(dq), parts[0]),
                (call.keys(dk), parts[1].sum(1, keepdim=True)),
                (call.keys(dv), parts[2].sum(1, keepdim=True)),
            ):
                if call.causal:
                    x.copy_(part)
                else:
                    x.add_(part)
        return dq.to(given), dk.to(given), dv.to(given)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = operator(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    return dq, dk, dv


@dataclass(frozen=True)
class _Call:
    """One operator call: views of packed tensors as (batch, heads, tokens, ...).

    Attributes:
        q: Packed rows of the queries.
        k: Packed rows of the keys.
        causal: Whether queries and keys are the same tokens, each seeing those before it.
        key_heads: `Hkv`.
        nodes: How many nodes of equal length the rows hold.
        head: The key head this call serves, with nodes as the batch; None: all, with key heads as the batch.
    """

    q: slice
    k: slice
    causal: bool
    key_heads: int
    nodes: int = 1
    head: int | None = None

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """A view of `x` (N, H, ...) with the query heads of one key head as heads."""
        x = x[self.q].unflatten(1, (self.key_heads, -1))
        if self.head is None:
            return x.movedim(0, 2)
        return x[:, self.head].unflatten(0, (self.nodes, -1)).transpose(1, 2)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """A view of `x` (N, Hkv, D) with one head."""
        x = x[self.k]
        if self.head is None:
            return x.transpose(0, 1).unsqueeze(1)
        return x[:, self.head].unflatten(0, (self.nodes, -1)).unsqueeze(1)


def _calls(layout: CascadeLayout, key_heads: int) -> Iterator[_Call]:
    """All causal calls, then the others, in as few calls as the lengths allow."""
    for start, length, count in layout.runs:
        if count > key_heads:
            rows = slice(start, start + count * length)
            for head in range(key_heads):
                yield _Call(rows, rows, True, key_heads, count, head)
        else:
            for at in range(start, start + count * length, length):
                yield _Call(slice(at, at + length), slice(at, at + length), True, key_heads)
    for level in layout.crosses:
        for cross in level:
            yield _Call(slice(cross.q_start, cross.q_end), slice(cross.k_start, cross.k_end), False, key_heads)


def _repeat(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    return keys.expand(-1, queries.shape[1], -1, -1)


def _rows(part: torch.Tensor) -> torch.Tensor:
    """(Hkv, r, n, ...) back to (n, H, ...); no copy, as the operator keeps the memory order of its queries."""
    return part.movedim(2, 0).flatten(1, 2)


BACKEND = AtenBackend()
