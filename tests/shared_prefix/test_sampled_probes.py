"""Sampled answers equal those of one row at a time, on the tree and by `generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from trl_ext.shared_prefix import sample_answers, sampled_probes

Tiny = Callable[..., tf.PreTrainedModel]


def uniform_draws(rows: int, most: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, most, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled_by_hand(
    model: Any, context: list[int], numbers: list[float], temperature: float, stop: set[int]
) -> list[int]:
    """Samples one token at a time by adding up the probabilities."""
    answer: list[int] = []
    model.eval()
    for number in numbers:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*context, *answer]])).logits[0, -1].double()
        total = 0.0
        token = -1
        for p in (logits / temperature).softmax(-1).tolist():
            total, token = total + p, token + 1
            if total > number:
                break
        if token in stop:
            return answer
        answer.append(token)
    return answer


@pytest.mark.parametrize("shared", ["always", "never"])
@pytest.mark.parametrize("batch_tokens", [1, 10**6])
def test_sampled_answers_are_those_of_single_rows(
    shared: Any, batch_tokens: int, tiny: Tiny, probe_rows: Any, by_hand: Any
) -> None:
    """Samples the same tokens on the tree and by transformers' `generate`."""
    model = tiny()
    rows = [row for row in probe_rows(rollouts=2, steps=3)[0] for _ in range(2)]
    draws, stop = uniform_draws(len(rows), 5), set(range(3, 20))
    sampled = sample_answers(
        model, rows, draws, temperature=0.6, stop=sorted(stop), shared=shared, batch_tokens=batch_tokens
    )
    expected = [
        sampled_by_hand(model, row, row_draws, 0.6, stop) for row, row_draws in zip(rows, draws.tolist(), strict=True)
    ]
    assert sampled.tokens == expected
    assert {len(answer) for answer in expected} >= {0, 5} and sampled.tokens[0] != sampled.tokens[1]
    for row, answer, logps, entropies in zip(rows, sampled.tokens, sampled.logps, sampled.entropies, strict=True):
        assert len(logps) == len(entropies) == len(answer)
        if answer:  # at temperature 1, whatever temperature they are sampled at
            expected_logps, expected_entropies = by_hand(model, row, answer)
            assert logps.tolist() == pytest.approx(expected_logps, abs=2e-5)
            assert entropies.tolist() == pytest.approx(expected_entropies, abs=2e-5)


@pytest.mark.parametrize("shared", ["always", "never"])
def test_without_a_stop_answers_are_full(shared: Any, tiny: Tiny, probe_rows: Any) -> None:
    rows = probe_rows(rollouts=1)[0]
    sampled = sample_answers(tiny(), rows, uniform_draws(len(rows), 8), shared=shared)
    assert [len(answer) for answer in sampled.tokens] == [8] * len(rows)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    uniform = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    tokens = sampled_probes.choose_tokens(logits.expand(2000, -1), uniform, 0.7)
    shares = torch.bincount(tokens, minlength=4) / 2000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=1e-3, rtol=0)
    assert sampled_probes.choose_tokens(logits, torch.tensor([1.0]), 1.0) == 3  # rounding at the upper end
