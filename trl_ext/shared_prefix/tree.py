"""The prefix tree of a micro-batch: runs of tokens, each shared by all rows below it.

A node is a run of tokens. The tokens of a row are the runs on the path from a root to the row's node, read in order.
There may be several roots (rows with nothing in common), any depth, and any number of children.

Built from the tokens themselves, so groups need no labels. Every comparison reads tokens that then belong to a run, in
blocks that double, so the work is linear in the number of tokens; children stand in the order of their first row, so
equal input gives an equal tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

MIN_RUN = 16
_FIRST_BLOCK = 64


@dataclass(frozen=True)
class Node:
    """One run of tokens.

    Attributes:
        rows: The rows that share the run, in order.
        start: Depth of the first token, counted from the beginning of its rows.
        end: Depth behind the last token.
        parent: Index of the node above, -1 for a root.
        level: 0 for a root, one more than the parent's otherwise.
    """

    rows: tuple[int, ...]
    start: int
    end: int
    parent: int
    level: int


@dataclass(frozen=True)
class PrefixTree:
    """Nodes in depth-first order, and for each row the node that holds its last token (-1 for an empty row)."""

    nodes: tuple[Node, ...]
    row_node: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all runs, each shared one counted once."""
        return sum(node.end - node.start for node in self.nodes)

    @property
    def depth(self) -> int:
        """Levels of the deepest path; 2 for prompts with completions."""
        return max((node.level + 1 for node in self.nodes), default=0)


def build_tree(rows: Sequence[Sequence[int]], min_run: int = MIN_RUN) -> PrefixTree:
    """The prefix tree of rows of any length.

    Args:
        rows: Token ids of each row, without padding.
        min_run: Shortest run that becomes a shared node. A shorter one is repeated in each child, since another node
            costs more than it saves. Rows that are equal to their end share their last node at any length.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tree_of(tokens, lengths, min_run)


def tree_of(tokens: IntArray, lengths: IntArray, min_run: int = MIN_RUN) -> PrefixTree:
    """`build_tree` for a left-aligned matrix `tokens` (B, L), of which row `i` holds `lengths[i]` tokens."""
    if min_run < 1:
        raise ValueError(f"min_run must be at least 1, got {min_run}.")
    nodes: list[Node] = []
    row_node = [-1] * len(lengths)

    def add(rows: IntArray, start: int, end: int, parent: int) -> int:
        level = nodes[parent].level + 1 if parent >= 0 else 0
        nodes.append(Node(tuple(rows.tolist()), start, end, parent, level))
        return len(nodes) - 1

    def finish(rows: IntArray, node: int) -> None:
        for row in rows.tolist():
            row_node[row] = node

    # Rows that agree up to `seen`, of which the tokens from `start` on belong to no node yet.
    todo: list[tuple[IntArray, int, int, int]] = []
    filled = np.flatnonzero(lengths > 0)
    if filled.size:
        todo.append((filled, 0, 0, -1))
    while todo:
        rows, start, seen, parent = todo.pop()
        end = _common_end(tokens, lengths, rows, seen)
        ended = lengths[rows] == end
        going = rows[~ended]
        if not going.size:  # one row, or rows equal to their end
            finish(rows, add(rows, start, end, parent))
            continue
        if end - start >= min_run:
            parent = add(rows, start, end, parent)
            finish(rows[ended], parent)
            start = end
        elif ended.any():
            finish(rows[ended], add(rows[ended], start, end, parent) if end > start else parent)
        groups: dict[int, list[int]] = {}
        for row, token in zip(going.tolist(), tokens[going, end].tolist(), strict=True):
            groups.setdefault(token, []).append(row)
        for members in reversed(groups.values()):
            todo.append((np.array(members, dtype=np.int64), start, end, parent))
    return PrefixTree(tuple(nodes), tuple(row_node))


def tree_of_neighbours(lengths: Sequence[int], common: Sequence[int], min_run: int = MIN_RUN) -> PrefixTree:
    """The prefix tree of rows of which only neighbours are compared, without a matrix of all their tokens.

    For rows that stand in order, such as the steps of a completion, it shares what `build_tree` shares. Of other rows
    it shares less, and is exact as well.

    Args:
        lengths: Tokens of each row.
        common: For each row how many tokens at its beginning are those of the row before; the first entry is not read.
        min_run: As in `build_tree`.
    """
    nodes: list[Node] = []
    row_node = [-1] * len(lengths)

    def add(rows: range, start: int, end: int, parent: int) -> int:
        level = nodes[parent].level + 1 if parent >= 0 else 0
        nodes.append(Node(tuple(rows), start, end, parent, level))
        return len(nodes) - 1

    # Neighbouring rows that agree up to somewhere, of which the tokens from `start` on belong to no node yet.
    todo = [(range(len(lengths)), 0, -1)]
    while todo:
        rows, start, parent = todo.pop()
        if not rows:
            continue
        end = min((common[row] for row in rows[1:]), default=lengths[rows[0]])
        ended = [row for row in rows if lengths[row] == end]
        if len(ended) == len(rows) or end - start >= min_run:
            if end > start:
                parent = add(rows, start, end, parent)
            for row in ended:
                row_node[row] = parent
            start = end
        else:
            for row in ended:  # the run is too short to be shared: each has its own
                row_node[row] = add(range(row, row + 1), start, end, parent) if end > start else parent
        cuts = [row for row in rows[1:] if common[row] == end]
        parts = [range(a, b) for a, b in pairwise([rows.start, *cuts, rows.stop])]
        todo += [(part, start, parent) for part in reversed(parts) if lengths[part.start] > end]
    return PrefixTree(tuple(nodes), tuple(row_node))


def _common_end(tokens: IntArray, lengths: IntArray, rows: IntArray, seen: int) -> int:
    """How far the rows agree, given that they agree up to `seen`."""
    stop = int(lengths[rows].min())
    first, others = tokens[rows[0]], rows[1:]
    if not others.size:
        return stop
    block = _FIRST_BLOCK
    while seen < stop:
        to = min(seen + block, stop)
        differs = (tokens[others, seen:to] != first[seen:to]).any(axis=0)
        if differs.any():
            return seen + int(differs.argmax())
        seen, block = to, 2 * block
    return stop
