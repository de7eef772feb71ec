"""The shared-prefix plugin on other families of models: served as TRL trains them, or refused before generation."""

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig

import trl_ext
from tests.plugins.shared_prefix.runs import NEEDS_FUSED, PACK, assert_same, metric, pair

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTER_COEFFICIENT = pytest.mark.skipif(
    not hasattr(trl.GRPOConfig, "router_aux_loss_coef"), reason="TRL adds no router's loss without this argument"
)


def model_of(tokenizer, family, **settings):
    """A tiny model of another family over the tokenizer of the test model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    sizes |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "initializer_range": 0.15}
    config = transformers.AutoConfig.for_model(family, **{**sizes, **settings})
    classes = transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM
    return classes["text_config" not in settings].from_config(config).float()


@pytest.fixture
def other(build, model, tmp_path):
    """`other(kind, family, model_settings, **settings)` makes a trainer whose model is of another family."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def make(kind, family, model_settings, **settings):
        policy = model_of(tokenizer, family, **model_settings)
        policy.config._name_or_path = policy.name_or_path = str(model)
        trainer = settings.pop("trainer", {})
        return build(kind, model=policy, trainer={"processing_class": tokenizer, **trainer}, **settings)

    return make


def pair_of(other, kind, family, model_settings, **settings):
    """The same run of another family dense and shared."""
    dense = other(kind, family, model_settings, **settings)
    dense.train()
    with trl_ext.enable(PACK):
        shared = other(kind, family, model_settings, **settings)
        shared.train()
    return dense, shared


@ROUTER_COEFFICIENT
@pytest.mark.parametrize("kind", ["grpo", "rloo", pytest.param("dpo", marks=NEEDS_FUSED)])
def test_a_mixture_of_experts_is_refused_before_generation(other, kind):
    with trl_ext.enable("shared-prefix"), pytest.raises(trl_ext.ConfigError, match=r"Set router_aux_loss_coef=0\.0"):
        other(kind, "qwen3_moe", {**MIXTURE, "head_dim": 8})


@ROUTER_COEFFICIENT
def test_following_the_advice_on_a_mixture_helps(other):
    dense, shared = pair_of(other, "grpo", "qwen3_moe", {**MIXTURE, "head_dim": 8}, router_aux_loss_coef=0.0)
    assert_same(dense, shared)
    assert metric(shared, "shared-prefix/dense_share") == [0, 0]


@ROUTER_COEFFICIENT
def test_a_mixture_can_run_dense(other):
    dense = other("grpo", "qwen3_moe", {**MIXTURE, "head_dim": 8})
    dense.train()
    with trl_ext.enable(shared_prefix={"on_refusal": "dense"}):
        shared = other("grpo", "qwen3_moe", {**MIXTURE, "head_dim": 8})
        shared.train()
    assert_same(dense, shared)
    assert metric(shared, "shared-prefix/dense_share") == [1, 1]


def test_models_that_cannot_be_shared_are_refused_before_generation(other):
    with trl_ext.enable("shared-prefix"), pytest.raises(trl_ext.ConfigError, match=r"residual_dropout=0\.1") as caught:
        other("grpo", "seed_oss", {"head_dim": 8, "residual_dropout": 0.1, "attention_dropout": 0.0})
    assert "'residual_dropout': 0.0" in str(caught.value)
    assert "on_refusal=dense" in str(caught.value)


def test_noise_on_embeddings_is_refused_before_a_model_is_loaded(build):
    with (
        trl_ext.enable("shared-prefix"),
        pytest.raises(trl_ext.ConfigError, match="Leave out neftune_noise_alpha"),
    ):
        build("grpo", neftune_noise_alpha=5.0, model="no-such-model")
    with trl_ext.enable(shared_prefix={"on_refusal": "dense"}):
        shared = build("grpo", neftune_noise_alpha=5.0)
        shared.train()
    assert set(metric(shared, "shared-prefix/dense_share")) == {1}


@pytest.mark.parametrize("kind", ["grpo", pytest.param("dpo", marks=NEEDS_FUSED)])
@pytest.mark.parametrize("family", ["gpt2", "hunyuan_v1_dense"])
def test_models_that_mind_left_padding(other, kind, family):
    settings = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512} if family == "gpt2" else {"head_dim": 8}
    if family == "gpt2":
        settings |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    dense, shared = pair_of(other, kind, family, settings, optim="sgd", learning_rate=0.1)
    assert_same(dense, shared)
    assert set(metric(shared, "shared-prefix/dense_share")) == {0}


VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS |= {"num_key_value_heads": 2, "initializer_range": 0.15}
MULTIMODAL = {
    "llava": ("llama", "clip_vision_model", {"image_token_index": 3}),
    "mistral3": ("mistral", "pixtral", {"image_token_index": 3}),
    "gemma3": ("gemma3_text", "siglip_vision_model", {"image_token_index": 3, "mm_tokens_per_image": 4}),
}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_text_alone_for_a_model_of_images(other, model, family):
    text, vision, settings = MULTIMODAL[family]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    settings = {
        "text_config": {"model_type": text, "head_dim": 8, **LAYERS, **special, "eos_token_id": tokenizer.eos_token_id},
        "vision_config": {"model_type": vision, "head_dim": 16, **VISION},
        **settings,
    }
    dense, shared = pair_of(other, "grpo", family, settings, optim="sgd", learning_rate=0.1, max_steps=1)
    assert_same(dense, shared)
    assert metric(shared, "shared-prefix/dense_share") == [0]


@NEEDS_FUSED
def test_pairs_with_an_activated_adapter(train):
    """The forward of pairs is below PEFT's wrapper. The reference has no adapter, so it is shared."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[2])
    settings = {"trainer": {"peft_config": adapter}, "optim": "sgd", "learning_rate": 0.1}
    with trl_ext.enable("shared-prefix"), pytest.raises(trl_ext.ConfigError, match="looks for its invocation tokens"):
        train("dpo", **settings)
    torch.manual_seed(0)
    dense = train("dpo", **settings)
    torch.manual_seed(0)
    with trl_ext.enable(shared_prefix={"on_refusal": "dense", "min_gain": 0}):
        shared = train("dpo", **settings)
    # Policy and reference are equal at first, so the share of pairs in which one is higher is a matter of rounding.
    for expected, parameter in zip(dense.model.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=5e-5, rtol=0)
    assert set(metric(shared, "shared-prefix/dense_share")) == {0.5}


@NEEDS_FUSED
def test_pairs_with_an_empty_prompt(train):
    pairs = [{"prompt": "" if row == 1 else "What is 1 + 1? " * 4, "chosen": f"yes {row}", "rejected": f"no {row}"}
             for row in range(8)]  # fmt: skip
    dense, shared = pair(train, "dpo", data=Dataset.from_list(pairs), optim="sgd", learning_rate=0.1)
    assert_same(dense, shared)
    assert set(metric(shared, "shared-prefix/dense_share")) == {0}


def test_small_micro_batches_and_bnpo_are_told(build):
    with trl_ext.enable("shared-prefix"):
        trainer = build("grpo", per_device_train_batch_size=2, gradient_accumulation_steps=4, loss_type="bnpo")
        notes = " ".join(trainer._trl_ext.plan.notes)
    assert "holds 2 of the 4 rows" in notes and "bnpo" in notes


@pytest.mark.parametrize(
    ("round_steps", "step_size", "told"), [(2, 2, False), (2, 4, False), (2, 3, True), (2, 1, True), (4, 2, True)]
)
def test_rows_dealt_to_other_steps_are_told(build, round_steps, step_size, told):
    with trl_ext.enable("shared-prefix"):
        trainer = build("grpo", steps_per_generation=round_steps, gradient_accumulation_steps=step_size)
        notes = " ".join(trainer._trl_ext.plan.notes)
    assert ("dealt to optimizer steps" in notes) == told


def test_bad_options():
    with pytest.raises(trl_ext.OptionError, match="'auto' or 'flash_attn'"):
        trl_ext.enable(shared_prefix={"backend": "cuda"})
    with pytest.raises(trl_ext.OptionError, match=">= 0, got -1"):
        trl_ext.enable(shared_prefix={"min_gain": -1})
