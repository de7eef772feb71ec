"""The mathematics of OTC: the paper's equations, its example, and the memory of fewest calls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.prompt_memory import PromptMemory
from trl_ext_plugins.otc import falling_coefficient, fewest_calls, scale_rewards, tool_coefficient

NAN = math.nan


COUNTS = st.integers(0, 60)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def coefficient(m: int, n: float, c: float = 4, **settings: Any) -> float:
    return tool_coefficient(torch.tensor([m]), tensor(n), c, **settings).item()


@settings(max_examples=200, deadline=None)
@given(COUNTS, st.one_of(COUNTS, st.just(NAN)), st.integers(0, 20))
def test_it_is_the_paper_s_equations(m: int, n: float, c: int) -> None:
    def paper() -> float:
        if math.isnan(n):
            return 1.0
        if m == 0 and n == 0:
            return 1.0
        if n == 0:
            return math.cos(m * math.pi / (2 * m + c))
        f = 2 * n * m / (m + n)
        return math.sin(f * math.pi / (2 * n))

    found = coefficient(m, n, c)
    assert found == pytest.approx(paper(), abs=1e-12)
    assert 0 <= found <= 1


@settings(max_examples=100, deadline=None)
@given(COUNTS, st.integers(0, 20))
def test_the_closed_forms(m: int, c: int) -> None:
    found = falling_coefficient(torch.tensor([m]), c).item()
    if m or c:
        assert found == pytest.approx(math.cos(m * math.pi / (2 * m + c)), abs=1e-12)
    assert 0 <= found <= 1 and falling_coefficient(torch.tensor([0]), c).item() == 1
    if m:
        assert coefficient(m, m, c) == 1
        assert falling_coefficient(torch.tensor([m]), m).item() == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_maximum_at_n(n: int) -> None:
    found = tool_coefficient(torch.arange(40), torch.full((40,), float(n)), 4)
    assert found[0] == 0 and found[n] == 1 and int((found == found.max()).sum()) == 1
    assert (found[: n + 1].diff() > 0).all() and (found[n:].diff() < 0).all()
    assert found[-1] > 0


@pytest.mark.parametrize("c", [1, 3, 4, 20])
def test_without_a_needed_call_every_call_costs(c: int) -> None:
    m = torch.arange(40)
    found = tool_coefficient(m, torch.zeros(40), c)
    assert found[0] == 1 and (found.diff() < 0).all() and (found > 0).all()
    assert torch.equal(found, falling_coefficient(m, c))
    harsher = falling_coefficient(m, c + 1)
    assert (harsher[1:] > found[1:]).all()  # a larger c is milder


def test_the_numbers_of_the_paper_s_example() -> None:
    found = [round(coefficient(m, 1), 3) for m in range(1, 6)]
    assert found == [1, 0.866, 0.707, 0.588, 0.5]
    assert [round(value, 3) for value in falling_coefficient(torch.arange(5), 4).tolist()] == found


def test_prompts_that_nobody_solved() -> None:
    assert [coefficient(m, NAN) for m in (0, 3)] == [1, 1]
    assert [coefficient(m, NAN, unsolved="cos") for m in (0, 3)] == falling_coefficient(
        torch.tensor([0, 3]), 4
    ).tolist()
    assert coefficient(3, 2, unsolved="cos") == coefficient(3, 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(COUNTS, st.booleans(), st.integers(0, 3)), min_size=1, max_size=20))
def test_fewest_calls_is_a_loop_over_right_rollouts(rows: list[tuple[int, bool, int]]) -> None:
    found = fewest_calls(*(torch.tensor(column) for column in zip(*rows, strict=True)))
    for (_, _, group), value in zip(rows, found.tolist(), strict=True):
        right = [m for m, correct, other in rows if correct and other == group]
        assert value == min(right) if right else math.isnan(value)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=3, max_size=3), min_size=1, max_size=6))
def test_what_is_remembered_never_grows(steps: list[list[tuple[int, bool]]]) -> None:
    """And the local form differs exactly where the history is smaller."""

    class Step:
        mode = "train"

    memory, keys, history = PromptMemory(merge=min), torch.zeros(3, dtype=torch.long), math.inf
    for step in steps:
        counted, correct = (torch.tensor(column) for column in zip(*step, strict=True))
        local = fewest_calls(counted, correct, keys)
        n = torch.fmin(memory.recall(keys), local)
        memory.update(Step(), keys, local)  # type: ignore[arg-type]
        value = n[0].item()
        assert math.isnan(value) == math.isinf(min(history, local.nan_to_num(math.inf)[0].item()))
        assert not value > history
        assert (value != local[0].item() and not math.isnan(value)) == (history < local.nan_to_num(math.inf)[0].item())
        history = min(history, torch.tensor(value).nan_to_num(math.inf).item())


def test_rewards_are_scaled_linearly() -> None:
    rewards = torch.tensor([[1.0, 0.2], [0.0, -1.0], [NAN, 0.5]])
    factor = tensor(0.5, 0.25, 0.5)
    found = scale_rewards(rewards, factor)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.1], [0, -0.25], [NAN, 0.25]]), equal_nan=True)
    torch.testing.assert_close(scale_rewards(rewards, factor, 3.0), 3 * found, equal_nan=True)
    spared = scale_rewards(rewards, factor, 2.0, spare_negative=True)
    torch.testing.assert_close(spared, torch.tensor([[1.0, 0.2], [0, -2.0], [NAN, 0.5]]), equal_nan=True)
    assert scale_rewards(rewards[:, 0], factor).shape == (3,) and found.dtype == torch.float32
