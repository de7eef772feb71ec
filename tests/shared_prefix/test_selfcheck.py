"""The first-use check finds a model that differs, runs once, and leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_ext.shared_prefix import (
    MismatchError,
    ModelParts,
    RefusedError,
    SelfCheck,
    self_check,
    selfcheck,
    shared_prefix_logps,
)

from .conftest import random_tokens


def ignore_positions(module: Any, args: Any, kwargs: Any) -> Any:
    """Replaces the positions by places in the packed row, as a model that ignores `position_ids` would."""
    if kwargs.get("position_ids") is not None:
        length = kwargs["position_ids"].shape[1]
        kwargs["position_ids"] = torch.arange(length)[None]
    return args, kwargs


def test_a_sound_model_passes(tiny: Any) -> None:
    result = self_check(tiny())
    assert isinstance(result, SelfCheck)
    assert result.ok
    assert result.model == "LlamaForCausalLM"
    assert (result.backend, result.dtype) == ("aten", torch.float32)
    assert result.logps < 5e-6
    assert result.grads is not None
    assert result.grads < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tiny: Any) -> None:
    result = self_check(tiny().to(dtype))
    assert result.dtype == dtype
    assert result.ok


def test_autocast(tiny: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = self_check(tiny())
    assert result.dtype == torch.bfloat16
    assert result.ok


def test_a_model_that_ignores_positions_is_found(tiny: Any, groups: Any, compare: Any) -> None:
    model = tiny(initializer_range=0.2)  # wide enough that attention is not nearly uniform
    model.model.register_forward_pre_hook(ignore_positions, with_kwargs=True)
    assert not self_check(model).ok
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not self_check(model).ok
    with pytest.raises(MismatchError, match=r"LlamaForCausalLM with the 'aten' kernels in torch\.float32 differs"):
        shared_prefix_logps(model, *groups)
    logps, _, report = shared_prefix_logps(model, *groups, on_refusal="dense")
    assert not report.packed
    assert report.reason is not None
    assert "differs from its own dense path" in report.reason
    assert compare(model, *groups, logps)[0] == 0.0


def test_it_runs_once_for_a_class_kernels_and_dtype(tiny: Any, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    original = selfcheck.self_check
    monkeypatch.setattr(selfcheck, "self_check", lambda *args, **kwargs: runs.append(args) or original(*args, **kwargs))
    for _ in range(3):
        shared_prefix_logps(tiny(), *groups)
    assert len(runs) == 1
    shared_prefix_logps(tiny(), *groups, backend="math")
    shared_prefix_logps(tiny().double(), *groups)
    shared_prefix_logps(tiny("Qwen2"), *groups)
    assert len(runs) == 4
    shared_prefix_logps(tiny("Qwen3", head_dim=8), *groups, check=False)
    assert len(runs) == 4


def test_no_trace(tiny: Any) -> None:
    model = tiny(attention_dropout=0.5)
    model.lm_head.eval()
    model.model.layers[0].weight_that_has_a_gradient = None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.gradient_checkpointing_enable()
    torch.manual_seed(3)
    state, training = torch.get_rng_state(), [m.training for m in model.modules()]
    with torch.no_grad():
        assert self_check(model).ok
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_frozen_models_compare_log_probabilities_only(tiny: Any) -> None:
    result = self_check(tiny().requires_grad_(False))
    assert result.grads is None
    assert result.ok


def test_inside_inference_mode(tiny: Any) -> None:
    model = tiny()
    with torch.inference_mode():
        assert self_check(model).ok


def test_not_a_number_is_a_mismatch() -> None:
    result = SelfCheck("M", "math", torch.float32, float("nan"), 0.0, (1e-4, 1e-3))
    assert not result.ok


def test_a_temperature_other_than_the_fused_heads_is_found(tiny: Any, groups: Any, add_fused_head: Any) -> None:
    model = tiny()
    add_fused_head(model, temperature=0.5)
    shared_prefix_logps(model, *groups, temperature=0.5)
    with pytest.raises(MismatchError, match="differs from its own dense path"):
        shared_prefix_logps(model, *groups, temperature=0.6)


class Watchful(nn.Module):
    """A wrapper that treats rows with a certain token in another way."""

    def __init__(self, model: nn.Module, token: int) -> None:
        super().__init__()
        self.model, self.token = model, token

    def forward(self, input_ids: torch.Tensor, **arguments: Any) -> Any:
        output = self.model(input_ids=input_ids, **arguments)
        seen = (input_ids == self.token).sum(1)
        output.logits = output.logits * (1 + seen)[:, None, None]
        return output


def test_a_wrapper_that_reads_its_rows_is_found(tiny: Any, padded: Any) -> None:
    """Only a token of the run's own prompts makes the difference."""
    rng = random.Random(0)
    prompts = [[*random_tokens(rng, 20), 990], [*random_tokens(rng, 20), 990]]
    batch = padded([(prompt, random_tokens(rng, 5)) for prompt in prompts for _ in range(3)])
    model = Watchful(tiny(vocab_size=997), token=990)
    with pytest.raises(MismatchError, match="differs from its own dense path"):
        shared_prefix_logps(model, *batch)
    assert self_check(model).ok
    assert not self_check(model, sample=[990]).ok


def test_an_adapter_that_reads_its_rows_is_found(tiny: Any) -> None:
    """The check plants the tokens that the adapter's configuration names."""
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = get_peft_model(tiny(), LoraConfig(**settings, alora_invocation_tokens=[7, 8]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    assert not self_check(model).ok


def test_another_configuration_of_a_class_is_checked_again(tiny: Any, groups: Any) -> None:
    shared_prefix_logps(tiny(initializer_range=0.2), *groups)
    broken = tiny(initializer_range=0.2, num_hidden_layers=3)
    broken.model.register_forward_pre_hook(ignore_positions, with_kwargs=True)
    with pytest.raises(MismatchError):
        shared_prefix_logps(broken, *groups)


def test_a_model_that_fails_on_a_packed_row_is_refused(tiny: Any, groups: Any) -> None:
    model = tiny()

    def needs_several_rows(module: nn.Module, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[0] == 1 and kwargs.get("attention_mask") is None:
            raise IndexError("row 1 is out of bounds")

    model.register_forward_pre_hook(needs_several_rows, with_kwargs=True)
    with pytest.raises(RefusedError, match=r"cannot run on a packed row \(IndexError: row 1 is out of bounds\)"):
        shared_prefix_logps(model, *groups)
    assert not shared_prefix_logps(model, *groups, on_refusal="dense")[2].packed


def test_the_sizes_of_empty_shards_are_not_asked(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed stage 3 leaves parameters of shape [0] behind, which are whole only inside a forward."""
    monkeypatch.setattr(ModelParts, "is_sharded", property(lambda self: True))
    monkeypatch.setattr(ModelParts, "embedding_weight", property(lambda self: torch.empty(0)))
    assert self_check(tiny()).ok
