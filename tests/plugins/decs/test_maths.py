"""DECS: formulas against loops, figures by hand and the properties that they must have."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.decs.maths import (
    Chunks,
    easy_allowed,
    easy_and_mixed,
    easy_dose,
    next_kappa,
    position_advantages,
    token_rewards,
)

NAN = math.nan
SEEDS = st.integers(0, 10_000)


def facts(seed: int, groups: int = 3, size: int = 4, width: int = 12) -> tuple[torch.Tensor, ...]:
    """(correct, spans, lengths, group ids) of random completions, some of them with a span."""
    generator = torch.Generator().manual_seed(seed)
    rows = groups * size

    def below(high: int) -> torch.Tensor:
        return torch.randint(0, high, (rows,), generator=generator)

    lengths = 2 + below(width - 1)
    correct = (below(3) > 0).double()
    start = below(width) % lengths
    end = start + below(width) % (lengths - start + 1)
    spans = torch.stack([start, end], dim=1) * correct.long().unsqueeze(1)
    return correct, spans, lengths, torch.arange(rows) // size


def advantages(
    correct: torch.Tensor, spans: torch.Tensor, lengths: torch.Tensor, ids: torch.Tensor, width: int, **settings: Any
) -> torch.Tensor:
    """As the plugin puts them together, without the mask."""
    rewards = token_rewards(correct, spans, lengths, width, **{"limit": 16} | settings)
    return position_advantages(rewards, ids)


# --- chunks and spans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "first", "span", "ratio", "labels"),
    [
        ((False, True, False, True), 1, (20, 40), 0.5, "bacd"),
        ((True, True), 0, (10, 20), 0.5, "ad"),
        ((False, True), 1, None, 1.0, "ba"),  # the answer comes last
        ((False, False), None, None, 0.0, "bb"),  # right, but no chunk says so
        ((), None, None, 0.0, "bb"),  # not asked
        ((None, True, True), None, None, 0.0, "bbb"),  # may have been the first
        ((True, None, False), 0, (10, 30), 1 / 3, "acc"),  # what comes after does not matter
        ((False, None), None, None, 0.0, "bb"),
    ],
)
def test_what_verdicts_mean(
    verdicts: tuple[bool | None, ...], first: int | None, span: Any, ratio: float, labels: str
) -> None:
    ends = tuple(10 * (i + 1) for i in range(max(len(verdicts), 2)))
    chunks = Chunks(ends, verdicts)
    assert (chunks.first, chunks.span, chunks.labels) == (first, span, labels)
    assert chunks.ratio == pytest.approx(ratio)


# --- rewards and advantages -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(["official", "eq9"]))
def test_it_is_the_loop_of_the_equations(seed: int, form: Any) -> None:
    correct, spans, lengths, ids = facts(seed)
    found = advantages(correct, spans, lengths, ids, 12, form=form)

    def reward(i: int, j: int) -> float:
        if not correct[i]:
            return 0.0
        if not spans[i, 0] <= j < spans[i, 1]:
            return 1.1
        share = lengths[i].item() / 16
        return 1.0 + 0.1 * (1 - share) if form == "official" else 1.0 - 0.1 * share

    for group, j in itertools.product(range(3), range(12)):
        rows = range(4 * group, 4 * group + 4)
        values = [reward(i, j) for i in rows]
        mean = sum(values) / 4
        std = math.sqrt(sum((value - mean) ** 2 for value in values) / 3)
        expected = [(value - mean) / (std + 1e-6) if max(values) - min(values) > 1e-6 else 0.0 for value in values]
        assert found[list(rows), j].tolist() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_without_spans_it_is_grpo_on_the_binary_reward(seed: int) -> None:
    correct, spans, lengths, ids = facts(seed)
    found = advantages(correct, torch.zeros_like(spans), lengths, ids, 12)
    assert torch.equal(found, found[:, :1].expand_as(found))
    torch.testing.assert_close(found[:, 0], group_normalize(1.1 * correct, ids, eps=1e-6))


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["official", "eq9"]))
def test_every_position_sums_to_0(seed: int, form: Any) -> None:
    found = advantages(*facts(seed), 12, form=form)
    assert found.view(3, 4, 12).sum(dim=1).abs().max() < 1e-9


@pytest.mark.parametrize("form", ["official", "eq9"])
def test_a_redundant_row_among_right_ones_loses(form: Any) -> None:
    spans = torch.tensor([[3, 7], [0, 0], [0, 0], [0, 0]])
    found = advantages(torch.ones(4), spans, torch.tensor([8, 6, 5, 8]), torch.zeros(4).long(), 10, form=form)
    assert (found[0, 3:7] < -1).all() and (found[1:, 3:7] > 0).all()
    assert (found[:, :3] == 0).all() and (found[:, 7:] == 0).all()


def test_finished_rows_count_with_their_padding() -> None:
    """A right sibling without a span may end anywhere: the others do not see it."""
    spans, ids = torch.tensor([[3, 7], [0, 0], [0, 0]]), torch.zeros(3).long()
    found = [advantages(torch.ones(3), spans, torch.tensor([8, 9, length]), ids, 10)[:2] for length in (1, 4, 9)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (found[0][0, 3:7] < 0).all()


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_the_limit_cancels_where_all_are_right(seed: int) -> None:
    _, spans, lengths, ids = facts(seed)
    right = torch.ones(12)
    near, far = (advantages(right, spans, lengths, ids, 12, limit=limit) for limit in (12, 1012))
    gaps = 0.1 / 1012  # the deviation that the epsilon of 1e-6 stands beside
    torch.testing.assert_close(near, far, atol=3 * 1e-6 / gaps, rtol=0)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["official", "eq9"]))
def test_only_the_span_has_the_lower_reward(seed: int, form: Any) -> None:
    correct, spans, lengths, _ = facts(seed)
    rewards = token_rewards(correct, spans, lengths, 12, limit=16, form=form)
    position = torch.arange(12)
    inside = (position >= spans[:, :1]) & (position < spans[:, 1:])
    right = (correct == 1).unsqueeze(1)
    assert (rewards[~right.expand_as(rewards)] == 0).all()
    assert (rewards[right & ~inside] == 1.1).all()
    low, high = (1.0, 1.1) if form == "official" else (0.9, 1.0)
    assert ((rewards[right & inside] >= low - 1e-9) & (rewards[right & inside] <= high)).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 20))
def test_a_wider_batch_changes_nothing(seed: int, more: int) -> None:
    narrow, wide = (advantages(*facts(seed), width) for width in (12, 12 + more))
    assert torch.equal(wide[:, :12], narrow)


@pytest.mark.parametrize("size", [3, 6, 7, 9, 10, 12])
def test_equal_rewards_give_exactly_0(size: int) -> None:
    rewards = torch.full((size, 5), 1.1)  # whose mean in float32 is not 1.1
    assert (position_advantages(rewards, torch.zeros(size).long()) == 0).all()


def test_rows_without_a_reward_count_nowhere() -> None:
    spans = torch.tensor([[2, 4], [0, 0], [0, 0], [0, 0]])
    ids, lengths = torch.zeros(4).long(), torch.full((4,), 5)
    found = advantages(torch.tensor([1.0, NAN, 0.0, 1.0]), spans, lengths, ids, 5)
    rest = [0, 2, 3]
    expected = advantages(torch.tensor([1.0, 0.0, 1.0]), spans[rest], lengths[rest], ids[rest], 5)
    torch.testing.assert_close(found[rest], expected)
    assert (found[1] == 0).all()
    assert (advantages(torch.full((4,), NAN), spans, lengths, ids, 5) == 0).all()


def test_a_group_of_one_and_a_group_without_a_right_row_give_nothing() -> None:
    spans, lengths = torch.tensor([[1, 3], [0, 0]]), torch.tensor([4, 4])
    assert (advantages(torch.tensor([1.0, 0.0]), spans, lengths, torch.arange(2), 4) == 0).all()
    assert (advantages(torch.zeros(2), spans, lengths, torch.zeros(2).long(), 4) == 0).all()


def test_one_right_row_keeps_a_positive_advantage_on_its_span() -> None:
    spans = torch.zeros(16, 2).long()
    spans[0] = torch.tensor([1, 3])
    correct = torch.zeros(16)
    correct[0] = 1
    found = advantages(correct, spans, torch.full((16,), 8), torch.zeros(16).long(), 4)
    assert (found[0] > 1).all() and (found[1:] < 0).all()


@pytest.mark.parametrize(("form", "expected"), [("official", 0.2), ("eq9", -0.1)])
def test_the_figures_of_a_mixed_group(form: Any, expected: float) -> None:
    """One wrong row of 16 lowers the mean so far that redundancy costs little: why the curriculum is needed."""
    spans = torch.zeros(16, 2).long()
    spans[0] = torch.tensor([1, 3])
    correct = torch.ones(16)
    correct[1] = 0
    lengths = torch.full((16,), 2)
    found = advantages(correct, spans, lengths, torch.zeros(16).long(), 4, form=form, limit=16)
    assert found[0, 1].item() == pytest.approx(expected, abs=0.05)
    correct[2:5] = 0
    found = advantages(correct, spans, lengths, torch.zeros(16).long(), 4, form=form, limit=16)
    assert found[0, 1] > 0


# --- curriculum -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), max_size=20), st.floats(0, 3))
def test_kappa_stays_between_0_and_its_cap(rounds: list[tuple[float, float]], lr: float) -> None:
    kappa, previous = 0.0, 0.5
    for ratio, cap in rounds:
        kappa, previous = next_kappa(kappa, ratio, previous, lr=lr, cap=cap), ratio
        assert 0 <= kappa <= min(cap, 0.99)
        assert easy_allowed(kappa, 50) >= 0


def test_a_steady_ratio_leaves_kappa_alone() -> None:
    assert next_kappa(0.3, 0.7, 0.7, lr=0.5) == 0.3
    assert next_kappa(0.3, 0.8, 0.7) > 0.3 > next_kappa(0.3, 0.6, 0.7)


@pytest.mark.parametrize(
    ("kappa", "mixed", "allowed"), [(0, 50, 0), (0.5, 7, 7), (0.1, 8, 0), (0.1, 10, 1), (0.99, 1, 98)]
)
def test_doses(kappa: float, mixed: int, allowed: int) -> None:
    assert easy_allowed(kappa, mixed) == allowed


def test_doses_add_up_over_small_rounds() -> None:
    """kappa = 0.2 asks for a quarter of the mixed prompts: one of every four."""
    waiting, doses = 0, []
    for mixed in (1, 2, 1, 8, 0, 3):
        allowed, waiting = easy_dose(0.2, mixed, waiting)
        doses.append((allowed, waiting))
    assert doses == [(0, 1), (0, 3), (1, 0), (2, 0), (0, 0), (0, 3)]
    assert easy_dose(0.0, 5, 3) == (0, 3) and easy_allowed(-0.5, 9) == 0


def test_kinds_of_prompts() -> None:
    """Rows without a reward do not count, nor does a group of them alone."""
    correct = torch.tensor([1, NAN, 1, 0, 1, 1, 0, 0, NAN, NAN])
    easy, mixed = easy_and_mixed(correct, torch.tensor([5, 5, 2, 2, 5, 2, 0, 0, 7, 7]))
    assert easy.tolist() == [5] and mixed.tolist() == [2]
