"""The attention patch: active in a packed forward and its recomputation, and without a trace afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_ext.shared_prefix import (
    RefusedError,
    SharedPrefixError,
    attention_patch,
    dense_scores,
    pack,
    packed_attention,
    packed_scores,
    shared_prefix_logps,
)

GRADS = 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_checkpointing(reentrant: bool, fused: bool, tiny: Any, groups: Any, add_fused_head: Any) -> None:
    """Lets the backward run each layer again, after the attention implementation was restored."""
    model = tiny()
    if fused:
        add_fused_head(model)
    weights = torch.linspace(-1, 1, groups[0].shape[0] * groups[2]).view(-1, groups[2])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            before = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
        model.zero_grad(set_to_none=True)
        logps, _, _ = shared_prefix_logps(model, *groups)
        assert model.config._attn_implementation == "sdpa"
        (logps * weights).sum().backward()
        assert model.config._attn_implementation == "sdpa"
        grads.append([p.grad.clone() for p in model.parameters()])
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == before
    for plain, again in zip(*grads, strict=True):
        assert float((plain - again).abs().max()) < 1e-6


def test_checkpointed_layers_do_run_the_cascade_again(tiny: Any, groups: Any) -> None:
    model = tiny()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing = pack(*groups)
    with packed_attention(model, packing.layout) as patch:
        hidden = model.model(input_ids=packing.input_ids, position_ids=packing.position_ids).last_hidden_state
    assert patch.attention_calls == 2
    hidden.sum().backward()
    assert patch.attention_calls == 4


def test_several_forwards_before_one_backward(tiny: Any, groups: Any, rollout: Any, scored_mask: Any) -> None:
    model = tiny()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = list(model.parameters())

    def gradients(packed: bool) -> list[torch.Tensor]:
        total = torch.zeros(())
        for ids, mask, width in (groups, rollout, groups):
            if packed:
                logps, _, report = shared_prefix_logps(model, ids, mask, width)
                assert report.packed
            else:
                logps = dense_scores(model, ids, mask, scored_mask(mask, width))["log_probs"]
            total = total + logps.pow(2).sum()
        return list(torch.autograd.grad(total, parameters))

    packed_grads, dense_grads = gradients(True), gradients(False)
    largest = max(float(grad.abs().max()) for grad in dense_grads)
    assert max(float((a - b).abs().max()) for a, b in zip(packed_grads, dense_grads, strict=True)) < GRADS * largest


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generation_and_dense_forwards_are_untouched(implementation: str, tiny: Any, groups: Any) -> None:
    ids, mask, _ = groups
    model = tiny().eval()
    model.set_attn_implementation(implementation)
    untouched = copy.deepcopy(model)
    shared_prefix_logps(model, *groups)
    assert model.config._attn_implementation == implementation
    assert not model.model._forward_hooks
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    prompts = {"input_ids": ids[:, :21], "attention_mask": mask[:, :21]}
    assert torch.equal(model.generate(**prompts, **settings), untouched.generate(**prompts, **settings))
    assert torch.equal(model(input_ids=ids).logits, untouched(input_ids=ids).logits)


def test_nested_configurations_are_restored_after_an_error(tiny: Any, groups: Any) -> None:
    model = tiny()
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    model.model.layers[1].self_attn.config._attn_implementation_internal = "eager"
    model.gradient_checkpointing_enable()
    before = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    packed_scores(model, pack(*groups))
    handle = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError, match="stop"):
        packed_scores(model, pack(*groups))
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert model.model.layers[1].self_attn.config._attn_implementation == "eager"
    assert [vars(m).get("_gradient_checkpointing_func") for m in model.modules()] == before
    assert not model.model._forward_hooks
    assert model(input_ids=groups[0]).logits.shape[-1] == 61


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "attention dropout of 0.1"),
        ({"is_causal": False}, "attention in both directions"),
        ({"sliding_window": 5}, "a window of 5 for rows of 29"),
        ({"s_aux": torch.ones(4)}, "attention sinks"),
        ({"position_bias": torch.ones(1)}, "a position bias"),
        ({"attention_mask": torch.ones(1, 1)}, "a mask"),
    ],
)
def test_a_layer_that_asks_for_more_is_refused(arguments: dict[str, Any], message: str, groups: Any, tiny: Any) -> None:
    """Tests the last guard, the attention call itself, for what no configuration shows."""
    packing = pack(*groups)

    q = torch.ones(1, 4, packing.packed_tokens, 8)
    with packed_attention(tiny(), packing.layout):
        attention = ALL_ATTENTION_FUNCTIONS[attention_patch.NAME]
        with pytest.raises(RefusedError, match=f"Linear asks for {message}"):
            attention(nn.Linear(1, 1), q, q, q, **{"attention_mask": None, **arguments})


def test_attention_outside_a_packed_forward_says_so(tiny: Any, groups: Any) -> None:
    attention_patch.register()
    model = tiny()
    model.config._attn_implementation = attention_patch.NAME
    with pytest.raises(SharedPrefixError, match="outside a packed forward"):
        model(input_ids=groups[0])
