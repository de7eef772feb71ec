"""The mathematics of HDPO: loops of the definitions, and invariants of the tool channel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.losses import clipped_surrogate
from trl_ext_plugins.hdpo import (
    accuracy_advantages,
    importance_ratio,
    round_share,
    tool_advantages,
    tool_rewards,
)

NAN = math.nan


GROUPS = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=5
)


def rows_of(groups: list[list[tuple[int, bool]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(calls (N,), correct (N,), group ids (N,))."""
    counted, correct = zip(*(row for group in groups for row in group), strict=True)
    return torch.tensor(counted), torch.tensor(correct), torch.arange(4 * len(groups)) // 4


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.booleans())
def test_it_is_the_loop_of_the_definition(groups: list[list[tuple[int, bool]]], scale: bool) -> None:
    counted, correct, ids = rows_of(groups)
    found = tool_advantages(counted, correct, ids, scale=scale)
    for start, group in enumerate(groups):
        right = [1 / (m + 1) for m, ok in group if ok]
        for row, (m, ok) in enumerate(group):
            value = found[4 * start + row].item()
            if not ok or len(right) < 2 or max(right) - min(right) <= 1e-8:
                assert value == 0
                continue
            mean = math.fsum(right) / len(right)
            std = math.sqrt(sum((r - mean) ** 2 for r in right) / (len(right) - 1))
            expected = (1 / (m + 1) - mean) / (std + 1e-6 if scale else 1)
            assert value == pytest.approx(expected, abs=1e-9)
            assert (value == 0) == (abs(1 / (m + 1) - mean) <= 1e-8)
    rewards = tool_rewards(counted, correct)
    assert rewards.tolist() == [1 / (m + 1) if ok else 0 for group in groups for m, ok in group]


@settings(max_examples=100, deadline=None)
@given(GROUPS)
def test_the_right_ones_sum_to_0_and_fewer_calls_are_never_worse(groups: list[list[tuple[int, bool]]]) -> None:
    counted, correct, ids = rows_of(groups)
    found = tool_advantages(counted, correct, ids)
    assert (found[~correct] == 0).all()
    assert found.view(-1, 4).sum(1).abs().max() < 1e-7
    for group in ids.unique():
        mine = (ids == group) & correct
        ordered = found[mine][counted[mine].argsort()]
        assert (ordered.diff() <= 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.integers(0, 19), st.integers(0, 12))
def test_what_wrong_rollouts_called_is_nothing(groups: list[list[tuple[int, bool]]], row: int, other: int) -> None:
    counted, correct, ids = rows_of(groups)
    row %= len(counted)
    changed = counted.clone()
    changed[row] = other
    wrong = correct.clone()
    wrong[row] = False
    plain = tool_advantages(counted, wrong, ids)
    assert torch.equal(tool_advantages(changed, wrong, ids), plain)
    # turning one wrong takes it out of its own group and leaves the others alone
    elsewhere = ids != ids[row]
    assert torch.equal(tool_advantages(counted, correct, ids)[elsewhere], plain[elsewhere]) and plain[row] == 0


@pytest.mark.parametrize("size", range(2, 17))
def test_equal_calls_give_exactly_nothing(size: int) -> None:
    for m in (0, 1, 2, 5, 6, 9):
        found = tool_advantages(torch.full((size,), m), torch.ones(size).bool(), torch.zeros(size))
        assert (found.float() == 0).all()


def test_a_rollout_at_the_mean_has_no_signal() -> None:
    found = tool_advantages(torch.tensor([1, 2, 5]), torch.ones(3).bool(), torch.zeros(3))  # 1/2, 1/3, 1/6
    assert found[1] == 0 and found[0] > 0 > found[2]


def test_accuracy_is_normalised_over_everybody() -> None:
    rewards = torch.tensor([1.0, 0.1, 0.0, NAN, 0.9, 0.9, 0.9, 0.9, 1.0])
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    found = accuracy_advantages(rewards, ids)
    valid = rewards[:3].double()
    torch.testing.assert_close(found[:3], (valid - valid.mean()) / (valid.std() + 1e-6))
    assert found[3:].tolist() == [0] * 6  # NaN, constant, alone
    assert accuracy_advantages(rewards, ids, scale=False)[0].item() == pytest.approx(1 - 1.1 / 3)


def reference_surrogate(ratio: float, advantage: float, low: float, high: float, dual: float | None) -> float:
    """The authors' order: clip, then the dual clip for negative advantages."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss = max(-ratio * advantage, -clipped * advantage)
    return min(loss, -dual * advantage) if dual is not None and advantage < 0 else loss


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_surrogate_is_the_authors_dual_clip(dual: float | None) -> None:
    for ratio in (0.01, 0.5, 0.8, 1.0, 1.1, 1.3, 2.9, 3.1, 50.0):
        for advantage in (-2.0, -0.1, 0.0, 0.7):
            found = clipped_surrogate(torch.tensor(ratio), torch.tensor(advantage), 0.2, 0.28, dual).item()
            assert found == pytest.approx(reference_surrogate(ratio, advantage, 0.2, 0.28, dual), rel=1e-6)


def test_ratios_per_token_and_per_sequence() -> None:
    new, old = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -2.0, 9.0]])
    mask = torch.tensor([[1, 1, 0]])
    assert importance_ratio(new, old, mask)[0, :2].tolist() == pytest.approx([math.exp(0.5), 1])
    assert importance_ratio(new, old, mask, "sequence").tolist() == [[pytest.approx(math.exp(0.25))]]
    assert importance_ratio(new, old, mask * 0, "sequence").tolist() == [[1]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_share_of_tokens_and_of_rows(rows: list[tuple[bool, bool, int]]) -> None:
    signal, kept, lengths = (torch.tensor(column) for column in zip(*rows, strict=True))
    learnt = [(s, n) for s, k, n in rows if k]
    tokens = sum(n for _, n in learnt)
    by_rows = round_share(signal, kept, lengths, None).item()
    assert by_rows == pytest.approx(sum(s for s, _ in learnt) / max(len(learnt), 1))
    by_tokens = round_share(signal, kept, lengths, torch.tensor(tokens)).item()
    assert by_tokens == pytest.approx(sum(n for s, n in learnt if s) / max(tokens, 1))
