"""References of PEFT policies: what a plugin compares with is the policy as training starts, whatever the adapter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import trl_ext
from tests.refusals import refused
from trl_ext.trl_internals.reference_adapters import ADAPTER
from trl_ext.trl_internals.reference_policy import _with_weights_of
from trl_ext_hooks import Plugin, hookimpl

TARGETS = {"target_modules": ["q_proj", "v_proj"]}
PROMPT = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
ADAPTERS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, **TARGETS),
    "dropout": lambda: peft.LoraConfig(r=4, lora_dropout=0.5, **TARGETS),
    "pissa": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **TARGETS),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "a trained layer": lambda: peft.LoraConfig(r=4, modules_to_save=["input_layernorm"], **TARGETS),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **PROMPT),
}


class Compares(Plugin):
    name = "compares"
    trainers = ("grpo", "rloo")
    needs = ("old_logps", "ref_logps")

    def start(self) -> None:
        self.seen: list[dict[str, float]] = []

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        def gap(name: str) -> float:
            return ((loss.batch[name] - loss.per_token_logps.detach()) * loss.mask).abs().max().item()

        self.seen.append({"old": gap("old_per_token_logps"), "reference": gap("ref_per_token_logps")})


def trained(model: str, adapter: str, **settings: Any) -> Any:
    """A model with an adapter that was trained before."""
    torch.manual_seed(0)
    policy = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), ADAPTERS[adapter](), **settings)
    with torch.no_grad():
        for value in policy.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    return policy


def values(policy: Any) -> dict[str, tuple[torch.Tensor, bool]]:
    return {name: (value.detach().clone(), value.requires_grad) for name, value in policy.named_parameters()}


def assert_same(one: dict[str, tuple[torch.Tensor, bool]], other: dict[str, tuple[torch.Tensor, bool]]) -> None:
    assert one.keys() == other.keys()
    for name, (value, trains) in one.items():
        assert torch.equal(value, other[name][0]) and trains == other[name][1], name


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "dropout"])
def test_the_reference_is_the_trained_adapter(adapter: str, model: str, build: Any, plugin: Any) -> None:
    policy = trained(model, adapter)
    before = values(policy)
    with trl_ext.enable(plugin(Compares)) as handle:
        trainer = build(beta=0.0, trainer={"model": policy}, max_steps=2, learning_rate=0.1)
        assert not any(value.requires_grad for name, value in policy.named_parameters() if ADAPTER in name.split("."))
        handle.disable()
    assert_same(before, values(policy))  # the copy is gone, and nothing else has changed
    assert list(policy.peft_config) == ["default"]
    trl_ext.attach(trainer, plugin(Compares))
    trainer.train()
    first, second = trainer._trl_ext.plugins["compares"].seen
    assert first == {"old": pytest.approx(0, abs=1e-5), "reference": pytest.approx(0, abs=1e-5)}
    assert second["old"] == pytest.approx(0, abs=1e-5)  # nor are old ones those of the reference
    assert second["reference"] > 1e-4
    trl_ext.detach(trainer)
    assert values(policy).keys() == before.keys()


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("adapter", ["lora", "ia3", "prompt"])
def test_the_reference_that_trl_copies(kind: str, adapter: str, model: str, build: Any, plugin: Any) -> None:
    """TRL's own copy lacks the values of IA3, whose names it does not match."""
    with trl_ext.enable(plugin(Compares)):
        trainer = build(kind, beta=0.05, trainer={"model": trained(model, adapter)}, max_steps=2, learning_rate=0.1)
        trainer.train()
        first, second = trainer._trl_ext.plugins["compares"].seen
    assert first["reference"] < 1e-5 and first["old"] < 1e-5
    assert second["reference"] > 1e-4 and second["old"] < 1e-5


def test_a_new_adapter_needs_no_copy(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Compares)):
        trainer = build(beta=0.0, trainer={"peft_config": ADAPTERS["lora"]()}, max_steps=1)
        assert list(trainer.model.peft_config) == ["default"]
        trainer.train()
        (only,) = trainer._trl_ext.plugins["compares"].seen
    assert only["reference"] < 1e-5


def test_a_new_adapter_that_changes_the_model_is_copied(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Compares)):
        trainer = build(beta=0.0, trainer={"peft_config": ADAPTERS["pissa"]()}, max_steps=1)
        trainer.train()
        (only,) = trainer._trl_ext.plugins["compares"].seen
    assert only["reference"] < 1e-5


def test_dropout_leaves_no_noise_in_the_reference(model: str, build: Any, plugin: Any) -> None:
    policy = trained(model, "dropout")
    with trl_ext.enable(plugin(Compares)):
        trainer = build(beta=0.0, trainer={"model": policy}, max_steps=1)
        trainer.train()
        batch = trainer._buffered_inputs[0]
        assert trainer.model.training
        policy.eval()
        policy.set_adapter(ADAPTER)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width = batch["completion_ids"].shape[1]
        with torch.no_grad():
            logits = policy(input_ids=ids, attention_mask=mask).logits[:, -width - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    counted = batch["completion_mask"].bool()
    torch.testing.assert_close(batch["ref_per_token_logps"][counted], expected[counted], atol=1e-4, rtol=0)


def test_adapters_of_which_no_copy_can_be_made(model: str, build: Any, plugin: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    biased = peft.get_peft_model(base, peft.LoraConfig(r=4, bias="all", **TARGETS))
    several = trained(model, "lora")
    several.add_adapter("second", ADAPTERS["lora"]())
    several.base_model.set_adapter(["default", "second"])
    named = trained(model, "lora", adapter_name=ADAPTER)
    with trl_ext.enable(plugin(Compares)):
        for policy, text in (
            (biased, "q_proj.base_layer.bias of the model itself is trained as well. Freeze it: a LoRA adapter needs"),
            (several, "several adapters are active (default, second). Merge the others into the model first"),
            (named, "and the adapter that trains has that name. Load it under another name."),
        ):
            with refused(trl_ext.ConfigError, "plugin 'compares' needs a reference policy", text):
                build(beta=0.0, trainer={"model": policy})


def test_trained_biases_are_refused_before_a_model_is_loaded(build: Any, plugin: Any) -> None:
    config = peft.LoraConfig(r=4, bias="lora_only", **TARGETS)
    with trl_ext.enable(plugin(Compares)), refused(trl_ext.ConfigError, "bias='lora_only' in the peft_config trains"):
        build(beta=0.0, model="/no/such/model", trainer={"peft_config": config})


def test_a_model_that_only_looks_like_one_of_peft(model: str, build: Any, plugin: Any) -> None:
    """Adapters that transformers adds itself leave such an attribute, and TRL sees an ordinary model."""
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.peft_config = {"default": ADAPTERS["lora"]()}
    given = {"model": policy, "processing_class": AutoTokenizer.from_pretrained(model)}
    with trl_ext.enable(plugin(Compares)):
        trainer = build(beta=0.0, trainer=given, max_steps=2, learning_rate=0.1)
        trainer.train()
        first, second = trainer._trl_ext.plugins["compares"].seen
    assert first["reference"] < 1e-5 and second["reference"] > 1e-4


def test_an_adapter_under_another_name(model: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Compares)):
        policy = trained(model, "lora", adapter_name="sft")
        trainer = build(beta=0.0, trainer={"model": policy}, max_steps=2, learning_rate=0.1)
        trainer.train()
        first, second = trainer._trl_ext.plugins["compares"].seen
    assert first["reference"] < 1e-5 and second["reference"] > 1e-4
    assert policy.active_adapter == "sft" and list(policy.peft_config) == ["sft"]


def test_an_adapter_called_ref_that_is_not_the_policy(model: str, build: Any, plugin: Any) -> None:
    policy = trained(model, "lora")
    policy.add_adapter(ADAPTER, ADAPTERS["lora"]())
    with trl_ext.enable(plugin(Compares)):
        trainer = build(beta=0.0, trainer={"model": policy})
        with refused(trl_ext.ConfigError, "It is the adapter 'ref'. Call delete_adapter('ref') on the model and set"):
            trainer.train()
    policy.delete_adapter(ADAPTER)
    with trl_ext.enable(plugin(Compares)):
        build(beta=0.0, trainer={"model": policy}, max_steps=1).train()


def test_the_reference_survives_a_checkpoint(model: str, build: Any, plugin: Any) -> None:
    settings = {"beta": 0.0, "max_steps": 2, "learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1}
    with trl_ext.enable(plugin(Compares)):
        trainer = build(trainer={"model": trained(model, "lora")}, **settings)
        trainer.train()
        _, expected = trainer._trl_ext.plugins["compares"].seen
        resumed = build(trainer={"model": trained(model, "lora")}, **settings)
        resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-1")
        (found,) = resumed._trl_ext.plugins["compares"].seen
    assert found["reference"] == pytest.approx(expected["reference"], rel=1e-3)


FAMILIES: dict[str, Any] = {
    "gemma2": {"head_dim": 8},  # embeddings are the last layer
    "llama": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},  # frequencies are no parameters
    "mixtral": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_of_a_whole_model(family: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": None}
    config = AutoConfig.for_model(family, **sizes, **heads, **FAMILIES[family])
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    made = _with_weights_of(policy, "compares", restore_head=False).eval()
    ids = torch.arange(1, 31).view(1, 30)  # longer than the positions that the model was made for
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, policy(input_ids=ids).logits)
        for value in policy.parameters():
            value.zero_()
        assert made(input_ids=ids).logits.any()
