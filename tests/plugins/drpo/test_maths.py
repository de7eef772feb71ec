"""The objective of DRPO and DisCO: its definition in loops, its invariants, and the constraint."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_plugins.drpo.maths import (
    Objective,
    completion_scores,
    constraint_factor,
    contrast,
    group_softmax,
    kl_values,
    length_logits,
)

SEEDS = st.integers(0, 10_000)
NAN = math.nan


def batch(seed: int, prompts: int = 4, size: int = 5) -> tuple[torch.Tensor, ...]:
    """Scores, classes with a few rows of none, shuffled group ids that are no small numbers, and lengths up to 20."""
    generator = torch.Generator().manual_seed(seed)
    scores = -2 * torch.rand(prompts * size, generator=generator, dtype=torch.float64)
    right = torch.randint(0, 2, (prompts * size,), generator=generator).double()
    right[torch.rand(len(right), generator=generator) < 0.1] = NAN
    ids = 7 * torch.arange(prompts).repeat_interleave(size)[torch.randperm(prompts * size, generator=generator)] + 3
    lengths = torch.randint(1, 21, (len(ids),), generator=generator)
    return scores, right, ids, lengths


def drpo(scores: torch.Tensor, right: torch.Tensor, ids: torch.Tensor, lengths: torch.Tensor) -> Objective:
    return contrast(scores, right, ids, length_logits(lengths, 20, 0.3), 0.5)


def disco(scores: torch.Tensor, right: torch.Tensor, ids: torch.Tensor, tau: float = 0.5) -> Objective:
    return contrast(scores, right, ids, torch.zeros_like(scores), tau)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.integers(1, 5), st.integers(1, 6), st.sampled_from([0.2, 10.0, math.inf]))
def test_it_is_the_loop_of_the_definition(seed: int, prompts: int, size: int, tau: float) -> None:
    scores, right, ids, lengths = batch(seed, prompts, size)
    scores.requires_grad_()
    value, mixed = torch.zeros((), dtype=torch.float64), 0
    for prompt in set(ids.tolist()):
        rows = [n for n in range(len(ids)) if ids[n] == prompt]
        good, bad = ([n for n in rows if right[n] == label] for label in (1, 0))
        if not good or not bad:
            continue
        mixed += 1
        weights = [math.exp((1 - lengths[n].item() / 20) / 0.3) for n in good]
        value = value + sum(w * scores[n] for w, n in zip(weights, good, strict=True)) / sum(weights)
        if math.isinf(tau):
            value = value - sum(scores[n] for n in bad) / len(bad)
        else:
            value = value - tau * torch.log(sum(torch.exp(scores[n] / tau) for n in bad) / len(bad))
    value = value / prompts
    slopes = torch.autograd.grad(value, scores)[0] if mixed else torch.zeros_like(scores)
    found = contrast(scores.detach(), right, ids, length_logits(lengths, 20, 0.3), tau)
    torch.testing.assert_close((found.value, found.slopes), (value.detach(), slopes), atol=1e-12, rtol=1e-9)
    assert (found.mixed, found.prompts) == (mixed, prompts)


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_no_right_answer_is_pushed_down_and_every_prompt_counts_alike(seed: int) -> None:
    """Up and down pulls of a prompt with both classes are 1 / P each, however many answers are right."""
    scores, right, ids, lengths = batch(seed)
    for found in (drpo(scores, right, ids, lengths), disco(scores, right, ids)):
        assert (found.slopes[right == 1] >= 0).all() and (found.slopes[right == 0] <= 0).all()
        assert (found.slopes[right.isnan()] == 0).all()
        for prompt in ids.unique():
            rows = ids == prompt
            mixed = (right[rows] == 1).any() and (right[rows] == 0).any()
            pulls = [found.slopes[rows & (right == label)].sum().item() for label in (1, 0)]
            assert pulls == pytest.approx([0.25, -0.25] if mixed else [0, 0], abs=1e-12)


def test_easy_and_hard_prompts_have_gradients_of_one_size() -> None:
    """With one, seven and four of eight answers right. The gradient of GRPO is 1.5 times as large at four."""
    ids = torch.arange(3).repeat_interleave(8)
    right = torch.tensor([1.0] + [0.0] * 7 + [1.0] * 7 + [0.0] + [1.0] * 4 + [0.0] * 4)
    found = disco(torch.zeros(24, dtype=torch.float64), right, ids)
    assert found.slopes.abs().view(3, 8).sum(1).tolist() == pytest.approx([2 / 3] * 3)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(-5, 5))
def test_invariances(seed: int, shift: float) -> None:
    scores, right, ids, lengths = batch(seed)
    ours = drpo(scores, right, ids, lengths)
    moved = drpo(scores + shift, right, ids, lengths)
    torch.testing.assert_close(moved.slopes, ours.slopes)
    rows = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    shuffled = drpo(scores[rows], right[rows], ids[rows], lengths[rows])
    torch.testing.assert_close((shuffled.value, shuffled.slopes), (ours.value, ours.slopes[rows]))


def test_two_right_answers_that_swap_lengths_swap_weights_and_the_short_one_weighs_more() -> None:
    scores, ids = torch.zeros(4, dtype=torch.float64), torch.zeros(4)
    right = torch.tensor([1.0, 1.0, 1.0, 0.0])
    one = drpo(scores, right, ids, torch.tensor([2, 10, 20, 5])).slopes
    two = drpo(scores, right, ids, torch.tensor([10, 2, 20, 5])).slopes
    assert torch.equal(one[[1, 0, 2, 3]], two) and one[0] > one[1] > one[2] > 0 > one[3]
    # exp((20 - 10) / 20 / 0.3) between lengths of 10 and 20
    assert (one[1] / one[2]).item() == pytest.approx(math.exp(0.5 / 0.3))


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_limits(seed: int) -> None:
    """lambda to infinity: DRPO is DisCO. tau to infinity: DisCO is DisCO-b. tau to 0: the likeliest wrong answer."""
    scores, right, ids, lengths = batch(seed)
    for temperature, close in ((1e9, 1e-8), (math.inf, 0)):
        found = contrast(scores, right, ids, length_logits(lengths, 20, temperature), 0.5)
        torch.testing.assert_close(found.slopes, disco(scores, right, ids).slopes, atol=close, rtol=close)
    large, plain = disco(scores, right, ids, 1e7), disco(scores, right, ids, math.inf)
    torch.testing.assert_close((large.slopes, large.value), (plain.slopes, plain.value), atol=1e-6, rtol=0)
    sharp = disco(scores, right, ids, 1e-4)
    for prompt in ids.unique():
        rows = torch.where((ids == prompt) & (right == 0))[0]
        if len(rows) and sharp.slopes[rows].any():
            assert sharp.slopes[rows].argmin() == scores[rows].argmax()


def test_prompts_of_one_class_and_no_rows_at_all() -> None:
    ids, scores = torch.tensor([0, 0, 1, 1, 2, 2]), torch.randn(6, dtype=torch.float64)
    found = disco(scores, torch.tensor([1.0, 1.0, 0.0, 0.0, NAN, NAN]), ids)
    assert found.value == 0 and (found.slopes == 0).all() and (found.mixed, found.prompts) == (0, 3)
    nothing = disco(scores[:0], scores[:0], ids[:0])
    assert nothing.value == 0 and (nothing.mixed, nothing.prompts) == (0, 0)


def test_extreme_numbers_stay_finite() -> None:
    ids, right = torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = contrast(
        torch.tensor([-900.0, -1.0, -800.0, -2.0]),
        right,
        ids,
        length_logits(torch.tensor([1, 40, 2, 3]), 40, 1e-3),
        1e-3,
    )
    assert found.value.isfinite() and found.slopes.tolist() == pytest.approx([1, 0, 0, -1])
    assert group_softmax(torch.zeros(4), ids, torch.zeros(4, dtype=torch.bool)).tolist() == [0.0] * 4


def test_scores() -> None:
    logps = torch.tensor([[-1.0, -3.0, -9.0], [-2.0, -4.0, -6.0], [-5.0, -5.0, -5.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    assert completion_scores(logps, logps - 1, mask).tolist() == [-2, -4, 0]  # and no NaN without a token
    ratios = completion_scores(logps, logps - math.log(2), mask, "Lratio")
    assert ratios.tolist() == pytest.approx([2, 2, 0])
    on_policy = completion_scores(logps[:2], logps[:2], mask[:2], "Lratio")
    assert group_softmax(on_policy / 0.01, torch.zeros(2), torch.ones(2, dtype=torch.bool)).tolist() == [0.5, 0.5]


def test_the_constraint() -> None:
    old = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    logps = torch.tensor([-1.5, -1.0], dtype=torch.float64)
    assert kl_values(logps, old).tolist() == [0.5, -1.0]
    assert kl_values(logps, old, "low_var_kl").tolist() == pytest.approx([math.exp(-0.5) - 0.5, math.e - 2])
    assert constraint_factor(torch.tensor(0.003), 0.001, 1e3).item() == pytest.approx(2)
    assert constraint_factor(torch.tensor(-0.5), 0.001, 1e3) == 0 == constraint_factor(torch.tensor(0.001), 0.001, 1e3)
