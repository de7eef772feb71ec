"""Pairs of DPO: whose log-probabilities the reference's are, and hooks that are bypassed or answer wrongly."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

import trl_ext
from tests.engine.stages.pair_plugins import Times, Twice, needs_fused, ragged, same
from trl_ext_hooks import PairLogps, Plugin, hookimpl


class Keeps(Times):
    """Remembers what it saw."""

    name = "keeps"

    @hookimpl
    def pair_logps(self, pairs: Any) -> PairLogps:
        self.kept = (pairs.batch, pairs.per_token_logps.detach(), pairs.ref_per_token_logps)
        return super().pair_logps(pairs=pairs)


def dense(model: Any, batch: Any) -> torch.Tensor:
    """(2n, L-1) by the definition."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return logits.log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2) * mask


@needs_fused
@pytest.mark.parametrize("kind", ["full", "fresh adapter", "trained adapter", "adapter and model"])
def test_references_are_right(train: Any, plugin: Any, model: str, kind: str) -> None:
    """The reference is the start of training, whatever holds it, and the same run equals plain TRL's."""
    lora = LoraConfig(r=2, target_modules="all-linear")

    def arguments() -> dict[str, Any]:
        if kind == "full":
            return {}
        if kind == "fresh adapter":
            return {"peft_config": lora}
        torch.manual_seed(0)
        policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora)
        with torch.no_grad():
            for name, value in policy.named_parameters():
                if "lora_B" in name:
                    value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
        extra = {"ref_model": AutoModelForCausalLM.from_pretrained(model)} if kind == "adapter and model" else {}
        return {"model": policy, **extra}

    plain = train("dpo", data=ragged(), max_steps=3, trainer=arguments())
    given = arguments()
    start = given["model"].merge_and_unload() if kind == "trained adapter" else None
    with trl_ext.enable(plugin(Keeps)):
        ours = train("dpo", data=ragged(), max_steps=3, trainer=arguments())
        batch, policy, reference = ours._trl_ext.plugins["keeps"].kept
    same(plain, ours)
    expected = dense(start or AutoModelForCausalLM.from_pretrained(model), batch)
    torch.testing.assert_close(reference, expected, atol=2e-5, rtol=0)
    assert (policy - reference).abs().max() > 1e-3


@needs_fused
def test_virtual_tokens_are_refused(build: Any, plugin: Any) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with (
        trl_ext.enable(plugin(Times)),
        pytest.raises(trl_ext.ConfigError, match=r"'times' needs the token ids in the forward.*LoRA"),
    ):
        build("dpo", data=ragged(), trainer={"peft_config": config})


@needs_fused
@pytest.mark.parametrize("lora", [False, True])
def test_shared_prefixes_underneath(train: Any, plugin: Any, lora: bool) -> None:
    extra = {"trainer": {"peft_config": LoraConfig(r=2, target_modules="all-linear")}} if lora else {}
    with trl_ext.enable(plugin(Twice)):
        plain = train("dpo", data=ragged(), max_steps=3, **extra)
    with trl_ext.enable(plugin(Twice), {"shared-prefix": {"min_gain": 0}}):
        shared = train("dpo", data=ragged(), max_steps=3, **extra)
        calls = shared._trl_ext.calls
    for (name, a), b in zip(plain.model.named_parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=5e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert calls["shared-prefix", "logps"] == 6 and calls["twice", "pair_logps"] == 3
    assert shared.state.log_history[0]["shared-prefix/token_ratio"] > 1.2


@needs_fused
def test_a_loss_that_bypasses_the_hook_stops_the_run(build: Any, plugin: Any) -> None:
    class Own(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            inputs = {k: v for k, v in inputs.items() if k not in ("completion_mask", "trl_ext_rows")}
            return model(**inputs).logits.mean()

    with trl_ext.enable(plugin(Times)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = build("dpo", cls=Own, data=ragged())
        with pytest.raises(trl_ext.PluginError, match="took its reference log-probabilities from somewhere else"):
            trainer.train()


@needs_fused
def test_a_silent_hook_stops_the_run(build: Any, plugin: Any) -> None:
    class Own(DPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            return model(input_ids=inputs["input_ids"]).logits.mean()

    with trl_ext.enable(plugin(Times)):
        trainer = build("dpo", cls=Own, data=ragged())
        with pytest.raises(trl_ext.PluginError, match=r"never ran: times\.pair_batch, times\.pair_logps"):
            trainer.train()


@needs_fused
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda p: p.per_token_logps, "returned Tensor from 'pair_logps', expected PairLogps"),
        (lambda p: PairLogps(p.per_token_logps[:2], p.ref_per_token_logps), "returned log-probabilities of shapes"),
        (
            lambda p: PairLogps(p.per_token_logps.detach(), p.ref_per_token_logps),
            "returned policy log-probabilities without a gradient",
        ),
    ],
)
def test_wrong_answers(build: Any, plugin: Any, answer: Any, expected: str) -> None:
    class Wrong(Plugin):
        name = "wrong"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs: Any) -> Any:
            return answer(pairs)

    with trl_ext.enable(plugin(Wrong)):
        trainer = build("dpo")
        with pytest.raises(trl_ext.PluginError, match=f"'wrong' {expected}"):
            trainer.train()


@needs_fused
def test_fields_are_owned(build: Any, plugin: Any) -> None:
    class Undeclared(Plugin):
        name = "undeclared"
        trainers = ("dpo",)

        @hookimpl
        def pair_batch(self, pairs: Any) -> dict[str, Any]:
            return {"secret": 1}

    with trl_ext.enable(plugin(Undeclared)):
        trainer = build("dpo")
        with pytest.raises(trl_ext.PluginError, match="'secret' from 'pair_batch' without declaring it"):
            trainer.train()


@needs_fused
def test_what_a_hook_writes_outside_the_completions_does_not_count(train: Any, plugin: Any) -> None:
    class Spills(Plugin):
        name = "spills"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs: Any) -> PairLogps:
            outside = 100.0 * ~pairs.mask
            return PairLogps(pairs.per_token_logps + outside, pairs.ref_per_token_logps - outside)

    plain = train("dpo", data=ragged())
    with trl_ext.enable(plugin(Spills)):
        ours = train("dpo", data=ragged())
    same(plain, ours)
