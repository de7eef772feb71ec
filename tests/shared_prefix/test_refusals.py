"""Each refusal names its reason and the way out, and nothing that works is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

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
    "learned positions": (
        "GPT2",
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        8,
        ("learned absolute positions (wpe)", "Turn shared prefixes off"),
    ),
    "positions by table": ("OPT", {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.0}, 8, ("embed_positions",)),
    "no interface": ("Bloom", {"n_head": 4}, 8, ("transformers' attention interface", "position_ids")),
    "attention dropout": (
        "Llama",
        {"attention_dropout": 0.1},
        8,
        ("attention_dropout=0.1 in training", "Set it to 0"),
    ),
    "dropout": ("Phi", {"resid_pdrop": 0.1}, 8, ("p=0.1", "disable_dropout=True")),
    "router loss": (
        "Mixtral",
        {"num_local_experts": 2, "output_router_logits": True},
        8,
        ("auxiliary loss", "output_router_logits=False"),
    ),
    "router noise": (
        "Mixtral",
        {"num_local_experts": 2, "router_jitter_noise": 0.1},
        8,
        ("jitter_noise=0.1", "Set it to 0"),
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
    "several axes": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        8,
        ("M-RoPE",),
    ),
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


def test_vision_inputs(tiny: Any) -> None:
    model = tiny()
    model.config.vision_config = tf.LlamaConfig()
    reason = why_not(model)
    assert reason is not None
    assert "takes more than text (vision_config). Load its text model" in reason


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
