"""Where the runs of a prefix tree lie in the packed row: all that the attention needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from .tree import PrefixTree


@dataclass(frozen=True)
class Cross:
    """Queries `[q_start, q_end)`, all below one node, that read all keys `[k_start, k_end)` of that node."""

    k_start: int
    k_end: int
    q_start: int
    q_end: int


@dataclass(frozen=True)
class CascadeLayout:
    """The nodes of a packed row in depth-first order.

    Attributes:
        bounds: Where each node begins, and behind the last one the length of the row.
        tails: Where the range of each node's descendants ends; it begins where the node ends.
        levels: Depth of each node in its tree.
        longest: Tokens of the longest row.
    """

    bounds: tuple[int, ...]
    tails: tuple[int, ...]
    levels: tuple[int, ...]
    longest: int

    @property
    def length(self) -> int:
        """Tokens in the packed row."""
        return self.bounds[-1]

    @cached_property
    def crosses(self) -> tuple[tuple[Cross, ...], ...]:
        """For each level the nodes that have descendants, in packed order."""
        levels: list[list[Cross]] = [[] for _ in range(max(self.levels, default=-1) + 1)]
        for i, tail in enumerate(self.tails):
            start, end = self.bounds[i], self.bounds[i + 1]
            if tail > end:
                levels[self.levels[i]].append(Cross(start, end, end, tail))
        return tuple(tuple(level) for level in levels if level)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring nodes of equal length: where the first begins, their length, their number."""
        found: list[tuple[int, int, int]] = []
        for start, end in pairwise(self.bounds):
            if found and found[-1][1] == end - start:
                found[-1] = (*found[-1][:2], found[-1][2] + 1)
            else:
                found.append((start, end - start, 1))
        return tuple(found)

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs of the attention."""
        own = sum((end - start) * (end - start + 1) // 2 for start, end in pairwise(self.bounds))
        return own + sum((c.k_end - c.k_start) * (c.q_end - c.q_start) for level in self.crosses for c in level)

    @cached_property
    def _varlen(self) -> dict[torch.device, tuple[VarlenCall, ...]]:
        return {}

    def varlen(self, device: torch.device) -> tuple[VarlenCall, ...]:
        """The whole attention as variable-length calls: one causal call for all nodes, and one for each level."""
        if device not in self._varlen:
            self._varlen[device] = (
                _varlen_self(self.bounds, device),
                *(_varlen_level(level, device) for level in self.crosses),
            )
        return self._varlen[device]


@dataclass(frozen=True)
class VarlenCall:
    """Arguments of one variable-length attention call. `rows_*` select the tokens: a slice where they adjoin."""

    causal: bool
    rows_q: slice | torch.Tensor
    rows_k: slice | torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


def layout_of(tree: PrefixTree) -> CascadeLayout:
    """Lays the nodes of a tree one behind the other in depth-first order."""
    bounds = [0]
    for node in tree.nodes:
        bounds.append(bounds[-1] + node.end - node.start)
    tails = list(bounds[1:])
    for i in range(len(tree.nodes) - 1, -1, -1):
        parent = tree.nodes[i].parent
        if parent >= 0:
            tails[parent] = max(tails[parent], tails[i])
    longest = max((node.end for node in tree.nodes), default=0)
    return CascadeLayout(tuple(bounds), tuple(tails), tuple(node.level for node in tree.nodes), longest)


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _select(ranges: list[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    if all(a[1] == b[0] for a, b in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)


def _varlen_self(bounds: tuple[int, ...], device: torch.device) -> VarlenCall:
    lengths = [end - start for start, end in pairwise(bounds)]
    cu, everything = _cumulative(lengths, device), slice(0, bounds[-1])
    return VarlenCall(True, everything, everything, cu, cu, max(lengths), max(lengths))


def _varlen_level(level: tuple[Cross, ...], device: torch.device) -> VarlenCall:
    queries, keys = [(c.q_start, c.q_end) for c in level], [(c.k_start, c.k_end) for c in level]
    len_q, len_k = [end - start for start, end in queries], [end - start for start, end in keys]
    return VarlenCall(
        False,
        _select(queries, device),
        _select(keys, device),
        _cumulative(len_q, device),
        _cumulative(len_k, device),
        max(len_q),
        max(len_k),
    )
