"""Each refusal names its reason and the way out, and nothing that works is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

from trl_ext.shared_prefix import why_not

# Each refused model, the longest row, and what the reason must say: why, and what to do.
CASES: dict[str, tuple[str, dict[str, Any], int, tuple[str, ...]]] = {
    "sliding window": (
        "Mistral",
        {"sliding_window": 20},
        25,
        ("over 20 tokens and the longest row has 25", "keep rows"),
    ),
    "sliding layers": (
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 20},
        25,
        ("sliding attention over 20 tokens and the longest row has 25", "keep rows that short"),
    ),
    "sinks": ("GptOss", {"head_dim": 16, "num_local_experts": 2}, 8, ("attention sinks", "self_attn.sinks")),
    "state": ("Mamba", {}, 8, ("carry a state along the row", "Turn shared prefixes off")),
    "linear attention": ("Qwen3Next", {"num_experts": 2}, 8, ("not plain attention (linear_attention)",)),
    "convolution": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"]},
        8,
        ("not plain attention (conv)", "Turn shared prefixes off"),
    ),
    "no interface": ("Bloom", {"n_head": 4}, 8, ("transformers' attention interface", "position_ids")),
    "attention dropout": (
        "Llama",
        {"attention_dropout": 0.1},
        8,
        ("attention_dropout=0.1 in training", "model_init_kwargs={'attention_dropout': 0.0}"),
    ),
    "dropout": ("Phi", {"resid_pdrop": 0.1}, 8, ("p=0.1", "disable_dropout=True")),
    "router noise": (
        "Mixtral",
        {"num_local_experts": 2, "router_jitter_noise": 0.1},
        8,
        ("jitter_noise=0.1", "Set router_jitter_noise=0.0", "disable_dropout does not reach it"),
    ),
    "stretched rotary": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 24},
        25,
        ("rotary frequencies with the padded length", "Stay within 24 tokens"),
    ),
    "both directions": (
        "Gemma3Text",
        {"head_dim": 16, "use_bidirectional_attention": True},
        8,
        ("attends in both directions",),
    ),
    "hidden states": ("Llama", {"output_hidden_states": True}, 8, ("hidden states of every layer", "to False")),
    "temperature": ("Llama", {"attn_temperature_tuning": True}, 8, ("Set attn_temperature_tuning=False",)),
    "alibi": ("Llama", {"alibi": True}, 8, ("ALiBi",)),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_with_reason_and_way_out(case: str, tiny: Any) -> None:
    family, settings, longest, expected = CASES[case]
    model = tiny(family, **settings)
    reason = why_not(model, longest=longest)
    assert reason is not None
    if case == "no interface":
        assert any(part in reason for part in expected), reason
        return
    for part in (type(model).__name__, *expected):
        assert part in reason, reason


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Mistral", {"sliding_window": 25}),
        ("Llama", {"attention_dropout": 0.1}),
        ("Phi", {"resid_pdrop": 0.1}),
        ("Gemma2", {"head_dim": 16}),
    ],
)
def test_not_refused_where_it_changes_nothing(family: str, settings: dict[str, Any], tiny: Any) -> None:
    """Takes a window as long as the rows, and dropout outside training."""
    assert why_not(tiny(family, **settings).eval(), longest=25) is None


# Noise that a trainer's `disable_dropout` does not reach, and the settings that the refusals name one after the other.
NOISY: dict[str, tuple[str, dict[str, Any]]] = {
    "residual dropout": ("SeedOss", {"head_dim": 8, "residual_dropout": 0.1, "attention_dropout": 0.1}),
    "two kinds of jitter": (
        "Phimoe",
        {"router_jitter_noise": 0.01, "input_jitter_noise": 0.02, "num_local_experts": 4},
    ),
    "residual and embedding": ("Starcoder2", {"residual_dropout": 0.1, "attention_dropout": 0.0}),
}


@pytest.mark.parametrize("case", NOISY)
def test_following_the_advice_on_noise_helps(case: str, tiny: Any) -> None:
    family, settings = NOISY[case]
    settings = dict(settings)
    for _ in range(5):
        model = tiny(family, **settings)
        disable_dropout_in_model(model)  # as `disable_dropout` does
        reason = why_not(model)
        if reason is None:
            break
        advice = re.search(r"Set (\w+)=0\.0 in the model's configuration", reason)
        assert advice is not None, reason
        assert settings[advice[1]] > 0, reason
        settings[advice[1]] = 0.0
    assert reason is None
    assert any(settings[name] != value for name, value in NOISY[case][1].items())


def test_noise_in_a_part_of_the_configuration(tiny: Any) -> None:
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1}
    parts = {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.1},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
    }
    reason = why_not(tiny("Dbrx", **sizes, **parts))
    assert reason is not None
    assert "Set moe_jitter_eps=0.0 in the DbrxFFNConfig of the model" in reason


def test_noise_on_embeddings(tiny: Any) -> None:
    model = tiny()
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    reason = why_not(model)
    assert reason is not None
    assert "Leave out neftune_noise_alpha" in reason
    assert why_not(model.eval()) is None


def test_the_mode_can_be_foreseen(tiny: Any) -> None:
    model = tiny(attention_dropout=0.1).eval()
    assert why_not(model) is None
    assert why_not(model, in_training=True) is not None


@pytest.mark.parametrize("kind", ["attention", "full_attention"])
def test_a_hybrid_class_whose_layers_are_all_attention(kind: str, tiny: Any) -> None:
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8}
    settings = {"num_local_experts": 0, "shared_intermediate_size": 32, "position_embedding_type": "rope", **mamba}
    assert why_not(tiny("GraniteMoeHybrid", layer_types=[kind] * 2, **settings)) is None
    reason = why_not(tiny("GraniteMoeHybrid", layer_types=[kind, "mamba"], **settings))
    assert reason is not None
    assert "not plain attention" in reason


def test_activated_lora(tiny: Any) -> None:
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    model = get_peft_model(tiny(), LoraConfig(**settings, alora_invocation_tokens=[7, 8]))
    for part in (model, model.get_base_model()):  # DPO's forward gets the model inside the wrapper
        reason = why_not(part)
        assert reason is not None
        assert "looks for its invocation tokens" in reason
    with model.disable_adapter():
        assert why_not(model) is None
    model.add_adapter("plain", LoraConfig(**settings))
    model.set_adapter("plain")
    assert why_not(model) is None


def test_encoder_decoder(tiny: Any) -> None:
    model = tiny()
    model.config.is_encoder_decoder = True
    reason = why_not(model)
    assert reason is not None
    assert "encoder-decoder" in reason


def test_data_parallel(tiny: Any) -> None:
    reason = why_not(nn.DataParallel(tiny()))
    assert reason is not None
    assert "Use DistributedDataParallel" in reason


def test_no_language_model() -> None:
    reason = why_not(nn.Linear(2, 2))
    assert reason is not None
    assert "no transformers model with a language-model head" in reason


def test_prompt_learning(tiny: Any) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(tiny(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    reason = why_not(model)
    assert reason is not None
    assert "prompt-learning adapter (default" in reason
    assert "Use LoRA" in reason


def test_lora_dropout(tiny: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, target_modules=["q_proj"]))
    reason = why_not(model.train())
    assert reason is not None
    assert "lora_dropout=0" in reason
    assert why_not(model.eval()) is None


def test_kernels_that_cannot_serve(tiny: Any) -> None:
    capped = tiny("Gemma2", head_dim=16).eval()
    reason = why_not(capped, backend="aten", dtype=torch.float32)
    assert reason is not None
    assert "no soft-capping" in reason
    assert why_not(capped, dtype=torch.float32) is None
    reason = why_not(tiny(), backend="flash_attn", dtype=torch.float32)
    assert reason is not None
    assert "for CUDA" in reason
