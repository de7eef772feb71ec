"""Forced answers equal those of one row at a time, and probes leave no trace on the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from trl_ext.shared_prefix import RefusedError, force_answers, probes, sample_answers

Tiny = Callable[..., tf.PreTrainedModel]


@pytest.mark.parametrize("shared", ["always", "never", "auto"])
@pytest.mark.parametrize("batch_tokens", [1, 150, 10**6])
def test_forced_answers_are_those_of_single_rows(
    shared: Any, batch_tokens: int, tiny: Tiny, probe_rows: Any, by_hand: Any
) -> None:
    model = tiny()
    rows, answers = probe_rows()
    forced = force_answers(model, rows, answers, shared=shared, batch_tokens=batch_tokens)
    assert forced.tokens == answers
    for row, answer, logps, entropies in zip(rows, answers, forced.logps, forced.entropies, strict=True):
        expected = by_hand(model, row, answer)
        assert logps.tolist() == pytest.approx(expected[0], abs=2e-5)
        assert entropies.tolist() == pytest.approx(expected[1], abs=2e-5)


def test_the_tree_computes_what_is_shared_once(tiny: Tiny, probe_rows: Any) -> None:
    model = tiny()
    rows, answers = probe_rows(steps=12)
    shared, dense = (force_answers(model, rows, answers, shared=way).cost for way in ("always", "never"))
    assert shared.row_tokens == dense.row_tokens == sum(len(r) + len(a) for r, a in zip(rows, answers, strict=True))
    assert shared.forwards == dense.forwards == 1 and (shared.dense_forwards, dense.dense_forwards) == (0, 1)
    assert dense.computed_tokens >= dense.row_tokens > 3 * shared.computed_tokens


def test_batches_keep_to_their_size(tiny: Tiny, probe_rows: Any) -> None:
    rows, answers = probe_rows(steps=12)
    small = force_answers(tiny(), rows, answers, batch_tokens=300).cost
    assert small.forwards == 2 and small.computed_tokens / small.forwards <= 300
    batches = list(probes.batches(rows, 300, False))
    assert [row for batch in batches for row in range(len(rows))[batch]] == list(range(len(rows)))
    assert all((batch.stop - batch.start) * max(map(len, rows[batch])) <= 300 for batch in batches)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2", "GPTNeoX"])
def test_other_models(family: str, tiny: Tiny, probe_rows: Any, by_hand: Any) -> None:
    model = tiny(family)
    rows, answers = probe_rows(rollouts=2)
    for shared in ("always", "never"):
        forced = force_answers(model, rows, answers, shared=shared)
        for row, answer, logps in zip(rows, answers, forced.logps, strict=True):
            assert logps.tolist() == pytest.approx(by_hand(model, row, answer)[0], abs=5e-5)


def test_a_fused_head_and_its_temperature_stay_aside(tiny: Tiny, probe_rows: Any, add_fused_head: Any) -> None:
    model = tiny()
    rows, answers = probe_rows(rollouts=1)
    expected = force_answers(model, rows, answers)
    add_fused_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    for shared in ("always", "never"):
        forced = force_answers(model, rows, answers, shared=shared)
        for a, b in zip(forced.logps, expected.logps, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_models_without_a_tree_run_dense_and_say_why(tiny: Tiny, probe_rows: Any, by_hand: Any) -> None:
    window = tiny("Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0)
    rows, answers = probe_rows(rollouts=1)
    forced = force_answers(window, rows, answers)
    assert forced.cost.dense_forwards == forced.cost.forwards and "window" in str(forced.cost.refusal)
    assert forced.logps[0].tolist() == pytest.approx(by_hand(window, rows[0], answers[0])[0], abs=2e-5)
    with pytest.raises(RefusedError, match="window"):
        force_answers(window, rows, answers, shared="always")
    with pytest.raises(RefusedError, match="window"):
        sample_answers(window, rows, torch.rand(len(rows), 2), shared="always")
    sampled = sample_answers(window, rows, torch.rand(len(rows), 2))
    assert sampled.cost.dense_forwards == sampled.cost.forwards and "window" in str(sampled.cost.refusal)


# --- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["always", "never"])
def test_the_model_and_the_random_stream_are_left_alone(shared: Any, tiny: Tiny, probe_rows: Any) -> None:
    model = tiny("Llama", attention_dropout=0.2)
    model.model.layers[0].eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    rows, answers = probe_rows(rollouts=1)
    draws = torch.rand(len(rows), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    forced = force_answers(model, rows, answers, shared=shared)
    sampled = sample_answers(model, rows, draws, shared=shared)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation and torch.is_grad_enabled()
    assert not any(value.requires_grad for value in (*forced.logps, *forced.entropies, *sampled.entropies))
    again = force_answers(model, rows, answers, shared=shared)  # without dropout, so always the same
    assert all(torch.equal(a, b) for a, b in zip(forced.logps, again.logps, strict=True))


def test_an_error_inside_leaves_the_mode_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, probe_rows: Any) -> None:
    model = tiny()
    monkeypatch.setattr(model.model, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        force_answers(model, *probe_rows(), shared="never")
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


def test_sharded_parameters_are_refused(tiny: Tiny, probe_rows: Any) -> None:
    model = tiny()
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    with pytest.raises(RefusedError, match="all parameters on each process"):
        force_answers(model, *probe_rows())
