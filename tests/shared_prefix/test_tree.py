"""The prefix tree equals what a naive reading of the rows says it must be."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_ext.shared_prefix import PrefixTree, build_tree
from trl_ext.shared_prefix.layout import layout_of
from trl_ext.shared_prefix.tree import tree_of_neighbours

letters = st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=9)


def spell(rows: list[list[int]], tree: PrefixTree, row: int) -> list[int]:
    """Returns the tokens of a row, read from its path."""
    index, runs = tree.row_node[row], []
    while index >= 0:
        node = tree.nodes[index]
        assert row in node.rows
        runs.append(rows[node.rows[0]][node.start : node.end])
        index = node.parent
    return [token for run in reversed(runs) for token in run]


@given(rows=letters, min_run=st.integers(1, 4))
def test_every_row_is_spelled_by_its_path(rows: list[list[int]], min_run: int) -> None:
    tree = build_tree(rows, min_run)
    assert [spell(rows, tree, i) for i in range(len(rows))] == rows


@given(rows=letters)
def test_with_runs_of_one_each_distinct_prefix_is_one_token(rows: list[list[int]]) -> None:
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    assert build_tree(rows, 1).tokens == len(prefixes)


@given(rows=letters, min_run=st.integers(1, 4))
def test_nodes_stand_depth_first_and_descendants_adjoin(rows: list[list[int]], min_run: int) -> None:
    tree = build_tree(rows, min_run)
    layout = layout_of(tree)
    for i, node in enumerate(tree.nodes):
        assert node.parent < i
        assert node.level == (tree.nodes[node.parent].level + 1 if node.parent >= 0 else 0)
        below = [j for j in range(len(tree.nodes)) if _is_below(tree, j, i)]
        assert below == list(range(i + 1, i + 1 + len(below)))
        assert layout.tails[i] == layout.bounds[i + 1 + len(below)]


@given(rows=letters, min_run=st.integers(1, 4))
def test_a_shared_node_with_children_has_the_minimum_run(rows: list[list[int]], min_run: int) -> None:
    tree = build_tree(rows, min_run)
    parents = {node.parent for node in tree.nodes}
    for i in parents - {-1}:
        assert tree.nodes[i].end - tree.nodes[i].start >= min_run
        assert len(tree.nodes[i].rows) > 1


def test_two_levels() -> None:
    prompt = list(range(20))
    tree = build_tree([[*prompt, 50], [*prompt, 51, 52], [*prompt, 53]])
    assert [(n.rows, n.start, n.end, n.parent) for n in tree.nodes] == [
        ((0, 1, 2), 0, 20, -1),
        ((0,), 20, 21, 0),
        ((1,), 20, 22, 0),
        ((2,), 20, 21, 0),
    ]
    assert tree.depth == 2


def test_a_short_shared_run_is_repeated_in_the_children() -> None:
    prompt = list(range(20))
    tree = build_tree([[*prompt, 30, 31], [*prompt, 30, 32], [*prompt, 40]], min_run=4)
    assert [(n.rows, n.start, n.end) for n in tree.nodes[1:]] == [((0,), 20, 22), ((1,), 20, 22), ((2,), 20, 21)]


def test_a_long_run_behind_a_short_one_is_shared_from_where_it_began() -> None:
    stem, tail = [1, 2], list(range(10, 20))
    tree = build_tree([stem + tail + [30], stem + tail + [31], [*stem, 5]], min_run=4)
    assert tree.nodes[0].rows == (0, 1)
    assert (tree.nodes[0].start, tree.nodes[0].end) == (0, 12)


def test_equal_rows_and_rows_that_begin_others() -> None:
    long = list(range(30))
    tree = build_tree([long, long[:18], long, [], long[:18]])
    assert tree.row_node[0] == tree.row_node[2] != tree.row_node[1] == tree.row_node[4]
    assert tree.row_node[3] == -1
    assert tree.tokens == 30


def test_no_rows() -> None:
    assert build_tree([]).nodes == ()
    assert build_tree([[], []]).row_node == (-1, -1)


def test_min_run_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="min_run must be at least 1, got 0"):
        build_tree([[1]], 0)


def test_the_same_rows_give_the_same_tree(trees: Callable[..., list[list[int]]]) -> None:
    for seed in range(20):
        rows = trees(seed)
        assert build_tree(rows, 2) == build_tree([list(row) for row in rows], 2)


def test_order_of_children_is_the_order_of_their_first_rows() -> None:
    rng = random.Random(0)
    prompt = list(range(16))
    heads = [7, 3, 9, 1]
    rows = [[*prompt, rng.choice(heads), i] for i in range(30)]
    tree = build_tree(rows, 1)
    first = [node.rows[0] for node in tree.nodes if node.level == 1]
    assert first == sorted(first)


def test_work_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts the tokens read on rows that part one after the other, the worst case of a naive comparison."""
    from trl_ext.shared_prefix import tree as module

    read = 0
    original = module._common_end

    def counted(tokens: np.ndarray, lengths: np.ndarray, rows: np.ndarray, seen: int) -> int:
        nonlocal read
        end = original(tokens, lengths, rows, seen)
        read += (end - seen + 64) * len(rows)  # runs, and at most one further block each
        return end

    monkeypatch.setattr(module, "_common_end", counted)
    stem = list(range(100, 900))
    rows = [[*stem[: 100 * i], i, *stem[:200]] for i in range(1, 8)]
    build_tree(rows)
    assert read < 2 * sum(map(len, rows))


def _is_below(tree: PrefixTree, node: int, above: int) -> bool:
    while tree.nodes[node].parent >= 0:
        node = tree.nodes[node].parent
        if node == above:
            return True
    return False


# --- from neighbours --------------------------------------------------------------------------------------------------


def shared_length(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def from_neighbours(rows: list[list[int]], min_run: int) -> PrefixTree:
    common = [0, *(shared_length(a, b) for a, b in pairwise(rows))]
    return tree_of_neighbours([len(row) for row in rows], common, min_run)


@given(rows=letters, min_run=st.integers(1, 4))
def test_neighbours_make_a_tree_that_spells_every_row(rows: list[list[int]], min_run: int) -> None:
    tree = from_neighbours(rows, min_run)
    assert [spell(rows, tree, i) for i in range(len(rows))] == rows
    for i, node in enumerate(tree.nodes):
        assert node.parent < i and node.end > node.start
        assert all(rows[row][: node.end] == rows[node.rows[0]][: node.end] for row in node.rows)
        below = [j for j in range(len(tree.nodes)) if _is_below(tree, j, i)]
        assert below == list(range(i + 1, i + 1 + len(below)))


@given(rows=letters)
def test_of_sorted_rows_neighbours_know_everything(rows: list[list[int]]) -> None:
    rows = sorted(rows)
    assert from_neighbours(rows, 1).tokens == build_tree(rows, 1).tokens


@given(start=st.lists(st.integers(0, 9), min_size=30, max_size=60), cuts=st.sets(st.integers(1, 60), min_size=1))
def test_steps_of_a_completion_are_shared(start: list[int], cuts: set[int]) -> None:
    """Builds the tree of prefixes of one row, each followed by the same text, which is all that is repeated."""
    text = [10, 11, 12]
    ends = sorted(cut for cut in cuts if cut <= len(start)) or [len(start)]
    rows = [[*start[:end], *text] for end in ends]
    assert from_neighbours(rows, 1).tokens == ends[-1] + 3 * len(ends)
    assert from_neighbours(rows, 16).tokens <= ends[-1] + (3 + 15) * len(ends)
