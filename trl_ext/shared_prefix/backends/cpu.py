"""`aten`: torch's own flash-attention operators for the CPU.

The operators expect tensors (batch, heads, tokens, width) with as many key heads as query heads. A model with grouped
queries has fewer key heads, and repeating its keys in memory would waste time and memory. So each call takes views of
the packed tensors in one of two arrangements, in which a key can be repeated by `expand`, without a copy:

- One node, or one node with its descendants: the key heads are the batch, and the query heads that read the same key
  head are the heads.
- Several adjacent nodes of equal length: the nodes are the batch, and there is one call per key head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..layout import CascadeLayout
from .interface import Backend, merge

_HALF = (torch.bfloat16, torch.float16)


class AtenBackend(Backend):
    """Flash attention on a CPU, in float32 and bfloat16."""

    name = "aten"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Requires a CPU, float32 or bfloat16, and scores that are not capped."""
        if device.type != "cpu":
            return f"its operators are for the CPU, but the model is on {device}."
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32 or bfloat16, not {dtype}."
        if softcap:
            return "its operators have no soft-capping of the attention scores."
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return f"torch {torch.__version__} has no flash-attention operators for the CPU."
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
        """Runs the causal calls, then merges the attention to the nodes above. See `Backend.forward`."""
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        for call in _calls(layout, k.shape[1]):
            queries = call.queries(q)
            keys, values = _repeated(call.keys(k), queries), _repeated(call.keys(v), queries)
            call_out, call_lse = _forward(queries, keys, values, call.causal, scale)
            if call.causal:
                # The causal calls come first, and each token is a query in exactly one of them.
                call.queries(out).copy_(call_out)
                call.queries(lse).copy_(call_lse)
            else:
                merge(out, lse, _token_major(call_out), _token_major(call_lse), call.query_rows)
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
        """Hands every call the merged `out` and `lse`, so that it returns its exact share of the gradients."""
        dtype = q.dtype
        if dtype in _HALF:
            # On processors without instructions for half types, the operator's backward is many times slower in them
            # than in float32. On the others it is less exact.
            dout, q, k, v, out = dout.float(), q.float(), k.float(), v.float(), out.float()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for call in _calls(layout, k.shape[1]):
            queries = call.queries(q)
            keys, values = _repeated(call.keys(k), queries), _repeated(call.keys(v), queries)
            call_dq, call_dk, call_dv = _backward(
                call.queries(dout), queries, keys, values, call.queries(out), call.queries(lse), call.causal, scale
            )
            # A key was repeated for each query head that reads it, so its gradients are summed over these heads.
            for total, share in (
                (call.queries(dq), call_dq),
                (call.keys(dk), call_dk.sum(1, keepdim=True)),
                (call.keys(dv), call_dv.sum(1, keepdim=True)),
            ):
                if call.causal:
                    total.copy_(share)
                else:
                    total.add_(share)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@dataclass(frozen=True)
class _Call:
    """One call of the operator, as views of the packed tensors.

    Attributes:
        query_rows: The packed tokens that are the queries.
        key_rows: The packed tokens that are the keys.
        causal: Whether queries and keys are the same tokens and each query sees the keys up to itself.
        key_heads: `Hkv`.
        nodes: Number of nodes of equal length that the rows hold.
        key_head: The key head that the call serves, with the nodes as the batch. None serves all key heads, with the
            key heads as the batch.
    """

    query_rows: slice
    key_rows: slice
    causal: bool
    key_heads: int
    nodes: int = 1
    key_head: int | None = None

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a view of `x` (N, H, ...) as (batch, query heads of one key head, tokens, ...)."""
        x = x[self.query_rows].unflatten(1, (self.key_heads, -1))
        if self.key_head is None:
            return x.movedim(0, 2)
        return x[:, self.key_head].unflatten(0, (self.nodes, -1)).transpose(1, 2)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a view of `x` (N, Hkv, D) as (batch, 1, tokens, D)."""
        x = x[self.key_rows]
        if self.key_head is None:
            return x.transpose(0, 1).unsqueeze(1)
        return x[:, self.key_head].unflatten(0, (self.nodes, -1)).unsqueeze(1)


def _calls(layout: CascadeLayout, key_heads: int) -> Iterator[_Call]:
    """Yields all causal calls, then the others, in as few calls as the lengths of the nodes allow."""
    for start, length, count in layout.runs:
        # `count` nodes need either one call each or one call per key head. Take what needs fewer.
        if count > key_heads:
            rows = slice(start, start + count * length)
            for key_head in range(key_heads):
                yield _Call(rows, rows, True, key_heads, count, key_head)
        else:
            for node_start in range(start, start + count * length, length):
                rows = slice(node_start, node_start + length)
                yield _Call(rows, rows, True, key_heads)
    for level in layout.crosses:
        for cross in level:
            yield _Call(slice(cross.q_start, cross.q_end), slice(cross.k_start, cross.k_end), False, key_heads)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calls the operator's forward without dropout."""
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
    """Calls the operator's backward without dropout."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = operator(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
    return dq, dk, dv


def _repeated(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Returns a view of the keys (batch, 1, tokens, D) with as many heads as the queries."""
    return keys.expand(-1, queries.shape[1], -1, -1)


def _token_major(x: torch.Tensor) -> torch.Tensor:
    """Brings (Hkv, H / Hkv, n, ...) back to (n, H, ...).

    Nothing is copied, as the operator returns its results in the memory order of the queries.
    """
    return x.movedim(2, 0).flatten(1, 2)
