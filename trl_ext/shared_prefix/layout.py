"""Layout of a prefix tree in the packed row: all that the attention kernels need to know.

The nodes stand one behind the other in depth-first order, so the descendants of a node follow it without a gap:

    A ─┬─ B            packed row   A A A A B B C C C D
       └─ C ── D       bounds       0       4   6     9 10
                       tails        A: 10, B: 6, C: 10, D: 10

A token attends to the earlier tokens of its own node and to all tokens of the nodes above. Without any mask this is
one causal call per node (A, B, C and D each to itself), plus one full call per node that has descendants: here the
queries [4, 10) to the keys of A, and the query [9, 10) to the keys of C.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from .tree import PrefixTree


@dataclass(frozen=True)
class Cross:
    """Attention of all descendants of one node to that node.

    Every query in `[q_start, q_end)` reads every key in `[k_start, k_end)`, so no mask is needed.
    """

    k_start: int
    k_end: int
    q_start: int
    q_end: int


@dataclass(frozen=True)
class VarlenCall:
    """Arguments of one variable-length attention call, which treats several segments of tokens separately.

    Attributes:
        causal: Whether a query sees only the keys up to its own place in the segment.
        rows_q: The packed tokens that are the queries. A slice if they are adjacent, so that nothing is copied.
        rows_k: The packed tokens that are the keys.
        cu_q: (segments + 1,) int32, where each segment of queries begins and the last one ends.
        cu_k: (segments + 1,) int32, the same for the keys.
        max_q: Queries of the longest segment.
        max_k: Keys of the longest segment.
    """

    causal: bool
    rows_q: slice | torch.Tensor
    rows_k: slice | torch.Tensor
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int


@dataclass(frozen=True)
class CascadeLayout:
    """Where the nodes lie in the packed row.

    Attributes:
        bounds: Where each node begins, followed by the length of the packed row.
        tails: For each node, where the range of its descendants ends. The range begins where the node ends.
        levels: Level of each node in the tree.
        longest: Number of tokens of the longest row.
    """

    bounds: tuple[int, ...]
    tails: tuple[int, ...]
    levels: tuple[int, ...]
    longest: int

    @property
    def length(self) -> int:
        """Returns the number of tokens in the packed row."""
        return self.bounds[-1]

    @cached_property
    def crosses(self) -> tuple[tuple[Cross, ...], ...]:
        """Returns a `Cross` for each node that has descendants, grouped by level.

        The nodes of one level never overlap, so a kernel may serve a whole level in one call.
        """
        by_level: list[list[Cross]] = [[] for _ in range(max(self.levels, default=-1) + 1)]
        for node, tail in enumerate(self.tails):
            start, end = self.bounds[node], self.bounds[node + 1]
            if tail > end:
                by_level[self.levels[node]].append(Cross(start, end, end, tail))
        return tuple(tuple(crosses) for crosses in by_level if crosses)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Returns the groups of adjacent nodes of equal length: where the first begins, their length, their number.

        Nodes of equal length can be the batch of one dense call.
        """
        runs: list[tuple[int, int, int]] = []
        for start, end in pairwise(self.bounds):
            if runs and runs[-1][1] == end - start:
                first, length, count = runs[-1]
                runs[-1] = (first, length, count + 1)
            else:
                runs.append((start, end - start, 1))
        return tuple(runs)

    @cached_property
    def pairs(self) -> int:
        """Returns the number of query-key pairs that the attention computes."""
        within = sum((end - start) * (end - start + 1) // 2 for start, end in pairwise(self.bounds))
        across = sum((c.k_end - c.k_start) * (c.q_end - c.q_start) for level in self.crosses for c in level)
        return within + across

    @cached_property
    def _calls_by_device(self) -> dict[torch.device, tuple[VarlenCall, ...]]:
        """Returns the memory of `varlen_calls`, empty at first."""
        return {}

    def varlen_calls(self, device: torch.device) -> tuple[VarlenCall, ...]:
        """Returns the whole attention as variable-length calls: a causal one for all nodes, then one for each level.

        The result is kept, as every layer of the model asks for it.
        """
        if device not in self._calls_by_device:
            self._calls_by_device[device] = (
                _causal_call(self.bounds, device),
                *(_level_call(level, device) for level in self.crosses),
            )
        return self._calls_by_device[device]


def layout_of(tree: PrefixTree) -> CascadeLayout:
    """Lays the nodes of a tree one behind the other in depth-first order."""
    bounds = [0]
    for node in tree.nodes:
        bounds.append(bounds[-1] + node.end - node.start)
    # Children come after their parents. Going backwards, a node's tail is final before its parent reads it.
    tails = list(bounds[1:])
    for index in range(len(tree.nodes) - 1, -1, -1):
        parent = tree.nodes[index].parent
        if parent >= 0:
            tails[parent] = max(tails[parent], tails[index])
    longest = max((node.end for node in tree.nodes), default=0)
    return CascadeLayout(tuple(bounds), tuple(tails), tuple(node.level for node in tree.nodes), longest)


def _causal_call(bounds: tuple[int, ...], device: torch.device) -> VarlenCall:
    """Returns the call in which each node attends causally to itself."""
    lengths = [end - start for start, end in pairwise(bounds)]
    cu, all_rows = _cumulative(lengths, device), slice(0, bounds[-1])
    return VarlenCall(True, all_rows, all_rows, cu, cu, max(lengths), max(lengths))


def _level_call(level: tuple[Cross, ...], device: torch.device) -> VarlenCall:
    """Returns the call in which the descendants of each node of one level attend to that node."""
    queries = [(cross.q_start, cross.q_end) for cross in level]
    keys = [(cross.k_start, cross.k_end) for cross in level]
    query_lengths = [end - start for start, end in queries]
    key_lengths = [end - start for start, end in keys]
    return VarlenCall(
        causal=False,
        rows_q=_select(queries, device),
        rows_k=_select(keys, device),
        cu_q=_cumulative(query_lengths, device),
        cu_k=_cumulative(key_lengths, device),
        max_q=max(query_lengths),
        max_k=max(key_lengths),
    )


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Returns the bounds of segments of these lengths, as the kernels want them."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _select(ranges: list[tuple[int, int]], device: torch.device) -> slice | torch.Tensor:
    """Returns an index for the tokens of these ranges: a slice if the ranges are adjacent, else their numbers."""
    if all(left[1] == right[0] for left, right in pairwise(ranges)):
        return slice(ranges[0][0], ranges[-1][1])
    return torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)
