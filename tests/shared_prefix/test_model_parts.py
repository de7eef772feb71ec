"""Model parts: found in any wrapper, and searched once in a call of any public function."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_ext.shared_prefix import (
    ModelCost,
    ModelParts,
    RefusedError,
    dense_scores,
    force_answers,
    has_fused_head,
    pack,
    packed_attention,
    packed_logits,
    packed_scores,
    sample_answers,
    self_check,
    shared_prefix_logps,
    shared_prefix_scores,
    why_not,
)
from trl_ext.shared_prefix import model_parts as module


def test_the_parts_of_a_wrapped_model(tiny: Any) -> None:
    causal_lm = tiny()
    wrapped = get_peft_model(causal_lm, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model_parts = ModelParts.of(wrapped)
    assert model_parts.model is wrapped
    assert model_parts.causal_lm is causal_lm
    assert model_parts.backbone is causal_lm.model
    assert model_parts.embeddings is causal_lm.model.embed_tokens
    assert model_parts.head is causal_lm.lm_head
    assert model_parts.text_config is causal_lm.config
    assert model_parts.class_name == "LlamaForCausalLM"
    assert model_parts.modules == tuple(wrapped.modules())
    assert any(config is causal_lm.config for config in model_parts.configs)
    assert (model_parts.device, model_parts.compute_dtype) == (torch.device("cpu"), torch.float32)
    called = model_parts.to_check()
    assert called.causal_lm is causal_lm
    assert called.modules == tuple(called.model.modules())


def test_parts_are_returned_as_they_are(tiny: Any) -> None:
    model_parts = ModelParts.of(tiny())
    assert ModelParts.of(model_parts) is model_parts


def test_the_dtype_is_that_of_the_moment(tiny: Any) -> None:
    model_parts = ModelParts.of(tiny())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model_parts.compute_dtype == torch.bfloat16
    model_parts.causal_lm.double()
    assert model_parts.compute_dtype == torch.float64


def test_the_fused_head_is_found_in_a_wrapper(tiny: Any, add_fused_head: Any) -> None:
    model = tiny()
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert not has_fused_head(wrapped)
    add_fused_head(model)
    assert has_fused_head(wrapped)


def test_configurations_of_layers_are_collected_once_each(tiny: Any) -> None:
    model = tiny()
    layer_config = type(model.config)(**model.config.to_diff_dict())
    model.model.layers[1].self_attn.config = layer_config
    configs = ModelParts.of(model).configs
    assert len(configs) == 2
    assert {id(config) for config in configs} == {id(model.config), id(layer_config)}


def test_models_without_the_parts_are_refused(tiny: Any) -> None:
    with pytest.raises(RefusedError, match="Linear contains no transformers model with a language-model head"):
        ModelParts.of(nn.Linear(2, 2))
    model = tiny()
    model.base_model_prefix = "absent"
    model_parts = ModelParts.of(model)  # enough for the dense path
    with pytest.raises(RefusedError, match="LlamaForCausalLM has no backbone apart from its head"):
        _ = model_parts.backbone


def test_sharded_parameters_are_seen(tiny: Any) -> None:
    model = tiny()
    assert not ModelParts.of(model).is_sharded
    next(model.parameters()).ds_id = 0  # as DeepSpeed marks them
    assert ModelParts.of(model).is_sharded


def test_evaluating_restores_the_mode_of_each_module(tiny: Any) -> None:
    model = tiny().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), module.evaluating(ModelParts.of(model)):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


Call = Callable[[nn.Module, tuple[torch.Tensor, torch.Tensor, int]], object]
CONTEXTS, ANSWERS = [[5, 6, 7, 8] * 6, [5, 6, 7, 8] * 6 + [9]], [[3], [4, 5]]


def _open_patch(model: nn.Module, batch: Any) -> None:
    with packed_attention(model, pack(*batch).layout, rows=torch.tensor([1])):
        pass


CALLS: dict[str, Call] = {
    "logps, packed and checked": lambda model, batch: shared_prefix_logps(model, *batch),
    "logps, dense for want of gain": lambda model, batch: shared_prefix_logps(model, *batch, min_gain=100),
    "logps, dense after a refusal": lambda model, batch: shared_prefix_logps(
        model, *batch, backend="flash_attn", on_refusal="dense"
    ),
    "scores": lambda model, batch: shared_prefix_scores(model, *batch[:2], logits_to_keep=batch[2]),
    "packed scores": lambda model, batch: packed_scores(model, pack(*batch)),
    "packed logits": lambda model, batch: packed_logits(model, pack(*batch)),
    "dense scores": lambda model, batch: dense_scores(model, batch[0], batch[1], pack(*batch).slots == 0),
    "patch": _open_patch,
    "refusals": lambda model, batch: why_not(model, pack(*batch), dtype=torch.float32),
    "check": lambda model, batch: self_check(model),
    "cost": lambda model, batch: ModelCost.of(model),
    "fused head": lambda model, batch: has_fused_head(model),
    "probes on the tree": lambda model, batch: force_answers(model, CONTEXTS, ANSWERS, shared="always", batch_tokens=1),
    "probes by themselves": lambda model, batch: force_answers(model, CONTEXTS, ANSWERS, shared="never"),
    "sampled on the tree": lambda model, batch: sample_answers(model, CONTEXTS, torch.rand(2, 3), shared="always"),
    "sampled by themselves": lambda model, batch: sample_answers(model, CONTEXTS, torch.rand(2, 3), shared="never"),
}


@pytest.mark.parametrize("fused", [False, True], ids=["own head", "fused head"])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_searches_the_model_once(
    call: str, fused: bool, tiny: Any, groups: Any, monkeypatch: pytest.MonkeyPatch, add_fused_head: Any
) -> None:
    model = tiny()
    if fused:
        add_fused_head(model)
    searched: list[nn.Module] = []
    search = module._search

    def counted(model: nn.Module) -> ModelParts:
        searched.append(model)
        return search(model)

    monkeypatch.setattr(module, "_search", counted)
    CALLS[call](model, groups)
    assert searched == [model]


def test_only_the_search_asks_a_model_for_its_parts() -> None:
    """Guards against lookups that go around the search, which the test above would not notice."""
    room = Path(module.__file__).parent
    questions = {"get_output_embeddings", "get_input_embeddings", "get_text_config", "base_model"}
    askers: dict[str, set[str]] = {}
    for file in room.rglob("*.py"):
        attributes = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        if attributes & questions:
            askers[file.name] = attributes & questions
    assert askers == {"model_parts.py": questions}
