"""The layout: the example of its docstring, and calls that cover the attention exactly once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_ext.shared_prefix import CascadeLayout, build_tree, pack
from trl_ext.shared_prefix.layout import Cross, layout_of

CPU = torch.device("cpu")
A, B, C, D = [1, 2, 3, 4], [5, 6], [7, 8, 9], [10]


@pytest.fixture
def example() -> CascadeLayout:
    """Returns the layout that the docstring of the module draws."""
    return layout_of(build_tree([A + B, A + C, A + C + D], min_run=1))


def test_the_example_of_the_docstring(example: CascadeLayout) -> None:
    assert example.bounds == (0, 4, 6, 9, 10)
    assert example.tails == (10, 6, 10, 10)
    assert example.levels == (0, 1, 1, 2)
    assert (example.length, example.longest) == (10, 8)
    assert example.crosses == ((Cross(0, 4, 4, 10),), (Cross(6, 9, 9, 10),))
    assert example.pairs == 10 + 3 + 6 + 1 + 6 * 4 + 1 * 3


def test_adjacent_nodes_of_equal_length_are_one_run(example: CascadeLayout) -> None:
    assert example.runs == ((0, 4, 1), (4, 2, 1), (6, 3, 1), (9, 1, 1))
    layout = layout_of(build_tree([A + [number] * 3 for number in range(5, 9)], min_run=1))
    assert layout.runs == ((0, 4, 1), (4, 3, 4))


def test_a_level_is_one_call_whatever_the_number_of_groups(
    groups: tuple[torch.Tensor, torch.Tensor, int],
) -> None:
    layout = pack(*groups).layout
    calls = layout.varlen_calls(CPU)
    assert [call.causal for call in calls] == [True, False]
    assert len(calls[1].cu_q) == 3  # two groups in one call
    assert layout.varlen_calls(CPU) is calls  # made once for all layers


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), min_run=st.integers(1, 4))
def test_variable_length_calls_cover_every_pair_once(
    seed: int,
    min_run: int,
    trees: Callable[..., list[list[int]]],
    ancestors: Callable[..., torch.Tensor],
) -> None:
    tree = build_tree(trees(seed), min_run)
    layout = layout_of(tree)
    times = torch.zeros(layout.length, layout.length, dtype=torch.long)
    tokens = torch.arange(layout.length)
    for call in layout.varlen_calls(CPU):
        queries, keys = tokens[call.rows_q], tokens[call.rows_k]
        segments = zip(pairwise(call.cu_q.tolist()), pairwise(call.cu_k.tolist()), strict=True)
        for (q_start, q_end), (k_start, k_end) in segments:
            assert q_end - q_start <= call.max_q and k_end - k_start <= call.max_k
            block = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.long)
            times[queries[q_start:q_end, None], keys[None, k_start:k_end]] += block.tril() if call.causal else block
    assert torch.equal(times, ancestors(tree, layout.bounds).long())
    assert int(times.sum()) == layout.pairs
