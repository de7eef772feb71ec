"""Probes: forced and drawn answers equal those of one row at a time, and leave no trace on the model."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from trl_ext.shared_prefix import RefusedError, force_answers, probes, sample_answers, sampled_probes

Tiny = Callable[..., tf.PreTrainedModel]
PROBE = [7, 8, 9, 11]


def contexts(seed: int = 0, rollouts: int = 3, steps: int = 4, length: int = 60) -> tuple[list[Any], list[Any]]:
    """Steps of a few rollouts of one prompt with a probe behind each, and an answer of 1 to 4 tokens."""
    draw = random.Random(seed)
    prompt = [draw.randrange(3, 61) for _ in range(20)]
    found, answers = [], []
    for _ in range(rollouts):
        completion = [draw.randrange(3, 61) for _ in range(length)]
        answer = [draw.randrange(3, 61) for _ in range(draw.randrange(1, 5))]
        for end in sorted(draw.sample(range(length), steps)):
            found.append([*prompt, *completion[: end + 1], *PROBE])
            answers.append(answer)
    return found, answers


def by_hand(
    model: Any, context: list[int], answer: list[int], temperature: float = 1.0
) -> tuple[list[float], list[float]]:
    """One row, one forward, the textbook formulas."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1].double()
    p = (logits / temperature).softmax(-1)
    logps = [p[i, token].log().item() for i, token in enumerate(answer)]
    return logps, (-(p * p.log()).sum(-1)).tolist()


@pytest.mark.parametrize("shared", ["always", "never", "auto"])
@pytest.mark.parametrize("batch_tokens", [1, 150, 10**6])
def test_forced_answers_are_those_of_single_rows(shared: Any, batch_tokens: int, tiny: Tiny) -> None:
    model = tiny()
    rows, answers = contexts()
    found = force_answers(model, rows, answers, shared=shared, batch_tokens=batch_tokens)
    assert found.tokens == answers
    for row, answer, logps, entropies in zip(rows, answers, found.logps, found.entropies, strict=True):
        expected = by_hand(model, row, answer)
        assert logps.tolist() == pytest.approx(expected[0], abs=2e-5)
        assert entropies.tolist() == pytest.approx(expected[1], abs=2e-5)


def test_the_tree_computes_what_is_shared_once(tiny: Tiny) -> None:
    model = tiny()
    rows, answers = contexts(steps=12)
    shared, dense = (force_answers(model, rows, answers, shared=way).cost for way in ("always", "never"))
    assert shared.row_tokens == dense.row_tokens == sum(len(r) + len(a) for r, a in zip(rows, answers, strict=True))
    assert shared.forwards == dense.forwards == 1 and (shared.dense_forwards, dense.dense_forwards) == (0, 1)
    assert dense.computed_tokens >= dense.row_tokens > 3 * shared.computed_tokens


def test_batches_keep_to_their_size(tiny: Tiny) -> None:
    rows, answers = contexts(steps=12)
    small = force_answers(tiny(), rows, answers, batch_tokens=300).cost
    assert small.forwards == 2 and small.computed_tokens / small.forwards <= 300
    parts = list(probes.batches(rows, 300, False))
    assert [row for part in parts for row in range(len(rows))[part]] == list(range(len(rows)))
    assert all((part.stop - part.start) * max(map(len, rows[part])) <= 300 for part in parts)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "GPTNeoX"])
def test_other_models(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    rows, answers = contexts(rollouts=2)
    for shared in ("always", "never"):
        found = force_answers(model, rows, answers, shared=shared)
        for row, answer, logps in zip(rows, answers, found.logps, strict=True):
            assert logps.tolist() == pytest.approx(by_hand(model, row, answer)[0], abs=5e-5)


def test_a_fused_head_and_its_temperature_stay_aside(tiny: Tiny) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = tiny()
    rows, answers = contexts(rollouts=1)
    expected = force_answers(model, rows, answers)
    add_fused_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    for shared in ("always", "never"):
        found = force_answers(model, rows, answers, shared=shared)
        for a, b in zip(found.logps, expected.logps, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_models_without_a_tree_run_dense_and_say_why(tiny: Tiny) -> None:
    window = tiny("Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0)
    rows, answers = contexts(rollouts=1)
    found = force_answers(window, rows, answers)
    assert found.cost.dense_forwards == found.cost.forwards and "window" in str(found.cost.refusal)
    assert found.logps[0].tolist() == pytest.approx(by_hand(window, rows[0], answers[0])[0], abs=2e-5)
    with pytest.raises(RefusedError, match="window"):
        force_answers(window, rows, answers, shared="always")
    with pytest.raises(RefusedError, match="window"):
        sample_answers(window, rows, torch.rand(len(rows), 2), shared="always")
    drawn = sample_answers(window, rows, torch.rand(len(rows), 2))
    assert drawn.cost.dense_forwards == drawn.cost.forwards and "window" in str(drawn.cost.refusal)


# --- drawing ----------------------------------------------------------------------------------------------------------


def uniforms(rows: int, most: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, most, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_by_hand(
    model: Any, context: list[int], numbers: list[float], temperature: float, stop: set[int]
) -> list[int]:
    """One token at a time from the cumulated probabilities."""
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
def test_drawn_answers_are_those_of_single_rows(shared: Any, batch_tokens: int, tiny: Tiny) -> None:
    """The tree and transformers' generate draw the same tokens."""
    model = tiny()
    rows = [row for row in contexts(rollouts=2, steps=3)[0] for _ in range(2)]
    numbers, stop = uniforms(len(rows), 5), set(range(3, 20))
    found = sample_answers(
        model, rows, numbers, temperature=0.6, stop=sorted(stop), shared=shared, batch_tokens=batch_tokens
    )
    expected = [drawn_by_hand(model, row, own, 0.6, stop) for row, own in zip(rows, numbers.tolist(), strict=True)]
    assert found.tokens == expected
    assert {len(answer) for answer in expected} >= {0, 5} and found.tokens[0] != found.tokens[1]
    for row, answer, logps, entropies in zip(rows, found.tokens, found.logps, found.entropies, strict=True):
        assert len(logps) == len(entropies) == len(answer)
        if answer:  # at temperature 1, whatever they are drawn with
            hand = by_hand(model, row, answer)
            assert logps.tolist() == pytest.approx(hand[0], abs=2e-5)
            assert entropies.tolist() == pytest.approx(hand[1], abs=2e-5)


@pytest.mark.parametrize("shared", ["always", "never"])
def test_without_a_stop_answers_are_full(shared: Any, tiny: Tiny) -> None:
    rows = contexts(rollouts=1)[0]
    found = sample_answers(tiny(), rows, uniforms(len(rows), 8), shared=shared)
    assert [len(answer) for answer in found.tokens] == [8] * len(rows)


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    numbers = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    chosen = sampled_probes.draw(logits.expand(2000, -1), numbers, 0.7)
    shares = torch.bincount(chosen, minlength=4) / 2000
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=1e-3, rtol=0)
    assert sampled_probes.draw(logits, torch.tensor([1.0]), 1.0) == 3  # rounding at the upper end


# --- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["always", "never"])
def test_the_model_and_the_random_stream_are_left_alone(shared: Any, tiny: Tiny) -> None:
    model = tiny("Llama", attention_dropout=0.2)
    model.model.layers[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    rows, answers = contexts(rollouts=1)
    numbers = uniforms(len(rows), 3)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = force_answers(model, rows, answers, shared=shared)
    drawn = sample_answers(model, rows, numbers, shared=shared)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation and torch.is_grad_enabled()
    assert not any(value.requires_grad for value in (*one.logps, *one.entropies, *drawn.entropies))
    again = force_answers(model, rows, answers, shared=shared)  # without dropout, so always the same
    assert all(torch.equal(a, b) for a, b in zip(one.logps, again.logps, strict=True))


def test_an_error_inside_leaves_the_mode_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        force_answers(model, *contexts(), shared="never")
    assert model.training and model.model.training


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "answers", "message"),
    [([[1, 2]], [], "1 contexts came with 0"), ([[]], [[1]], "is empty"), ([[1]], [[]], "is empty")],
)
def test_bad_rows(rows: Any, answers: Any, message: str, tiny: Tiny) -> None:
    with pytest.raises(ValueError, match=message):
        force_answers(tiny(), rows, answers)


def test_nothing_to_ask(tiny: Tiny) -> None:
    assert force_answers(tiny(), [], []).logps == []
    assert sample_answers(tiny(), [], torch.rand(0, 4)).tokens == []


def test_sharded_parameters_are_refused(tiny: Tiny) -> None:
    model = tiny()
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(RefusedError, match="all parameters on each process"):
        force_answers(model, *contexts())
