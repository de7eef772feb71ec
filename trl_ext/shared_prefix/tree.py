"""Prefix tree of a micro-batch: runs of tokens, each stored once for all rows that share it.

A node is a run of tokens. A row consists of the runs on the path from a root to the node where the row ends:

    row 0: the cat sat down          the cat ─┬─ sat ─┬─ down     (row 0)
    row 1: the cat sat still                  │       └─ still    (row 1)
    row 2: the cat ran                        └─ ran              (row 2)

A tree may have several roots (rows that share nothing), any depth, and any number of children at a node.

Only the token ids decide, so groups need no labels. The time taken is linear in the number of tokens. Children are
ordered by their first row, so equal input gives an equal tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        rows: The rows that share the run, in ascending order.
        start: Depth of the first token, which is its index within each of these rows.
        end: Depth just behind the last token.
        parent: Index of the node above, -1 for a root.
        level: 0 for a root, otherwise one more than the parent's level.
    """

    rows: tuple[int, ...]
    start: int
    end: int
    parent: int
    level: int


@dataclass(frozen=True)
class PrefixTree:
    """A prefix tree.

    Attributes:
        nodes: All nodes in depth-first order, so a parent comes before its children.
        row_node: For each row, the index of the node that holds its last token, -1 for an empty row.
    """

    nodes: tuple[Node, ...]
    row_node: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Returns the number of tokens in all runs. A shared token counts once."""
        return sum(node.end - node.start for node in self.nodes)

    @property
    def depth(self) -> int:
        """Returns the number of levels of the deepest path: 2 for prompts with completions."""
        return max((node.level + 1 for node in self.nodes), default=0)


class _TreeBuilder:
    """Collects the nodes of a tree in depth-first order."""

    def __init__(self, row_count: int) -> None:
        self._nodes: list[Node] = []
        self._row_node = [-1] * row_count

    def add_node(self, rows: Iterable[int], start: int, end: int, parent: int) -> int:
        """Appends a node and returns its index."""
        level = self._nodes[parent].level + 1 if parent >= 0 else 0
        self._nodes.append(Node(tuple(rows), start, end, parent, level))
        return len(self._nodes) - 1

    def end_rows(self, rows: Iterable[int], node: int) -> None:
        """Records that these rows end in this node."""
        for row in rows:
            self._row_node[row] = node

    def build(self) -> PrefixTree:
        """Returns the finished tree."""
        return PrefixTree(tuple(self._nodes), tuple(self._row_node))


def build_tree(rows: Sequence[Sequence[int]], min_run: int = MIN_RUN) -> PrefixTree:
    """Builds the prefix tree of rows of any length.

    Args:
        rows: Token ids of each row, without padding.
        min_run: Length of the shortest run that becomes a shared node. A shorter run is repeated in each child, as a
            further node would cost more than it saves. Rows that are equal to the end share their last node anyway.
    """
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    tokens = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tree_of_matrix(tokens, lengths, min_run)


def tree_of_matrix(tokens: IntArray, lengths: IntArray, min_run: int = MIN_RUN) -> PrefixTree:
    """Builds the tree of a left-aligned matrix of tokens.

    Args:
        tokens: (B, L). Row `i` consists of its first `lengths[i]` entries.
        lengths: (B,).
        min_run: As in `build_tree`.
    """
    if min_run < 1:
        raise ValueError(f"min_run must be at least 1, got {min_run}.")
    builder = _TreeBuilder(len(lengths))
    # Each entry of the stack is a set of rows that agree on their first `agreed` tokens. Those from `start` on belong
    # to no node yet, because the runs found since `start` were too short for nodes of their own.
    stack: list[tuple[IntArray, int, int, int]] = []
    nonempty = np.flatnonzero(lengths > 0)
    if nonempty.size:
        stack.append((nonempty, 0, 0, -1))
    while stack:
        rows, start, agreed, parent = stack.pop()
        end = _common_end(tokens, lengths, rows, agreed)
        ends_here = lengths[rows] == end
        ended, continuing = rows[ends_here].tolist(), rows[~ends_here]
        if not continuing.size:
            # A single row, or several that are equal to the end: the run is a leaf at any length.
            builder.end_rows(ended, builder.add_node(ended, start, end, parent))
            continue
        if end - start >= min_run:
            # The run is long enough to be shared. What follows starts fresh below it.
            parent = builder.add_node(rows.tolist(), start, end, parent)
            builder.end_rows(ended, parent)
            start = end
        elif ended:
            # The run is too short to be shared, but some rows end with it. They get a leaf of their own, while the
            # continuing rows carry the run along, from `start`, into their children.
            builder.end_rows(ended, builder.add_node(ended, start, end, parent) if end > start else parent)
        # The rows part here. Each distinct next token opens a branch.
        branches: dict[int, list[int]] = {}
        for row, token in zip(continuing.tolist(), tokens[continuing, end].tolist(), strict=True):
            branches.setdefault(token, []).append(row)
        # The stack is last in, first out: reversed, the branch of the first row is popped first.
        for branch in reversed(branches.values()):
            stack.append((np.array(branch, dtype=np.int64), start, end, parent))
    return builder.build()


def tree_of_neighbours(lengths: Sequence[int], common: Sequence[int], min_run: int = MIN_RUN) -> PrefixTree:
    """Builds a prefix tree from how much neighbouring rows share, without a matrix of all their tokens.

    For rows in a sensible order, such as the steps of one completion, it shares what `build_tree` shares. For rows in
    another order it shares less and is still exact.

    Args:
        lengths: Number of tokens of each row.
        common: For each row, how many of its first tokens equal those of the row before. The first entry is not read.
        min_run: As in `build_tree`.
    """
    builder = _TreeBuilder(len(lengths))
    # As in `tree_of_matrix`. A set of rows is a range here, and the length that they agree on follows from `common`.
    stack = [(range(len(lengths)), 0, -1)]
    while stack:
        rows, start, parent = stack.pop()
        if not rows:
            continue
        end = min((common[row] for row in rows[1:]), default=lengths[rows[0]])
        ended = [row for row in rows if lengths[row] == end]
        if len(ended) == len(rows) or end - start >= min_run:
            if end > start:
                parent = builder.add_node(rows, start, end, parent)
            builder.end_rows(ended, parent)
            start = end
        else:
            # The run is too short to be shared, so each row that ends with it gets a leaf of its own.
            for row in ended:
                builder.end_rows([row], builder.add_node([row], start, end, parent) if end > start else parent)
        # A new branch starts at every row that shares no more than `end` with the row before it.
        cuts = [row for row in rows[1:] if common[row] == end]
        branches = [range(first, behind) for first, behind in pairwise([rows.start, *cuts, rows.stop])]
        stack += [(branch, start, parent) for branch in reversed(branches) if lengths[branch.start] > end]
    return builder.build()


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """Counts the tokens at the beginning that two rows have in common."""
    # A binary search over slices: comparing two slices is much faster than comparing their tokens in a Python loop.
    equal, limit = 0, min(len(left), len(right))
    while equal < limit:
        middle = (equal + limit + 1) // 2
        if left[equal:middle] == right[equal:middle]:
            equal = middle
        else:
            limit = middle - 1
    return equal


def _common_end(tokens: IntArray, lengths: IntArray, rows: IntArray, agreed: int) -> int:
    """Returns how many first tokens the rows have in common, given that they agree on the first `agreed`."""
    limit = int(lengths[rows].min())
    first, others = tokens[rows[0]], rows[1:]
    if not others.size:
        return limit
    # Blocks that double in size need few numpy calls. Only the last block can be read in vain, and it is about as long
    # as the part found equal before it, so the work over the whole tree stays linear in its tokens.
    block = _FIRST_BLOCK
    while agreed < limit:
        stop = min(agreed + block, limit)
        differs = (tokens[others, agreed:stop] != first[agreed:stop]).any(axis=0)
        if differs.any():
            return agreed + int(differs.argmax())
        agreed, block = stop, 2 * block
    return limit
