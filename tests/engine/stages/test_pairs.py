"""Pairs of DPO: hooks leave everything that TRL forms of log-probabilities to TRL, and rows stay with them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig
from trl import DPOTrainer

import trl_ext
from tests.engine.stages.pair_plugins import FUSED, Times, Twice, needs_fused, ragged, same
from trl_ext.testing import tiny_data
from trl_ext_hooks import PairLogps, Plugin, hookimpl

LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
DIVERGENT = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


SETTINGS: list[dict[str, Any]] = [
    {"loss_type": LOSSES, "label_smoothing": 0.1},
    {"loss_type": DIVERGENT, "f_divergence_type": "forward_kl", "label_smoothing": 0.1},
    {"loss_type": DIVERGENT, "f_divergence_type": "js_divergence", "label_smoothing": 0.1},
    {"loss_type": DIVERGENT, "f_divergence_type": "alpha_divergence", "label_smoothing": 0.1},
    {"use_weighting": True},
    {"ld_alpha": 0.5},
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "max_steps": 3},
    {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "gradient_checkpointing": False},
    {"max_length": 20, "truncation_mode": "keep_end", "remove_unused_columns": False},
    {"bf16": True},
]


@needs_fused
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s)))
def test_weights_of_one_are_bit_identical(train: Any, plugin: Any, settings: dict[str, Any]) -> None:
    data = ragged()
    evaluation = {"trainer": {"eval_dataset": ragged(8)}, "eval_strategy": "steps", "eval_steps": 1}
    plain = train("dpo", data=data, **evaluation, **settings)
    with trl_ext.enable(plugin(checked(Times, settings))):
        ours = train("dpo", data=data, **evaluation, **settings)
    same(plain, ours)
    (entry,) = [e for e in ours.state.log_history if e["step"] == 1 and "loss" in e]
    assert entry["times/logp"] < 0


@needs_fused
def test_these_are_all_losses_and_divergences() -> None:
    source = inspect.getsource(DPOTrainer)
    assert set(re.findall(r'if loss_type == "(\w+)"', source)) == set(LOSSES)
    tried = {settings.get("f_divergence_type", "reverse_kl") for settings in SETTINGS}
    assert set(re.findall(r'f_divergence_type == "(\w+)"', source)) == tried


def checked(cls: type, settings: dict[str, Any]) -> type:
    """The plugin's own look at rows, which truncated ids would fail."""
    if "truncation_mode" not in settings:
        return cls

    class Unchecked(cls):  # type: ignore[misc,valid-type]
        @hookimpl
        def pair_batch(self, pairs: Any) -> dict[str, Any]:
            return {"weight": torch.ones(len(pairs.rows))}

    return Unchecked


@needs_fused
def test_weights_of_two_are_twice_beta(train: Any, plugin: Any) -> None:
    stronger = train("dpo", data=ragged(), beta=0.2)
    with trl_ext.enable(plugin(Twice)):
        twice = train("dpo", data=ragged(), beta=0.1)
    for (name, a), b in zip(stronger.model.named_parameters(), twice.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert twice.state.log_history[1]["logps/chosen"] == 2 * stronger.state.log_history[1]["logps/chosen"]


@needs_fused
def test_chained_in_order(train: Any, plugin: Any) -> None:
    class First(Plugin):
        name = "first"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs: Any) -> PairLogps:
            self.got = pairs.per_token_logps.detach()
            return PairLogps(3 * pairs.per_token_logps, 3 * pairs.ref_per_token_logps)

    class Second(Plugin):
        name = "second"
        trainers = ("dpo",)

        @hookimpl
        def pair_logps(self, pairs: Any) -> None:
            self.got = pairs.per_token_logps.detach()

    with trl_ext.enable(plugin(First), plugin(Second)):
        trainer = train("dpo", max_steps=1)
        plugins = trainer._trl_ext.plugins
    assert torch.equal(plugins["second"].got, 3 * plugins["first"].got)


@pytest.mark.skipif(FUSED, reason="about TRL before 1.15")
def test_an_older_trl_is_refused(plugin: Any) -> None:
    """There the rewrite would never be called, and training would stay plain DPO without a word."""
    with pytest.raises(trl_ext.CompatError, match=r"add_fused_lm_head is missing, TRL has it from 1\.15"):
        trl_ext.enable(plugin(Times))


@needs_fused
@pytest.mark.parametrize("workers", [0, 2])
def test_columns_reach_the_hooks_and_the_model_sees_none(build: Any, plugin: Any, workers: int) -> None:
    with trl_ext.enable(plugin(Times)):
        trainer = build(
            "dpo", data=ragged(), max_steps=2, dataloader_num_workers=workers, trainer={"eval_dataset": ragged(8)}
        )
        calls: list[set[str]] = []
        for model in (trainer.model, trainer.ref_model):
            model.register_forward_pre_hook(lambda m, a, k: calls.append(set(k)), with_kwargs=True)
        trainer.train()
        trainer.evaluate()
        seen = trainer._trl_ext.plugins["times"].seen
    assert sorted(number for mode, _, numbers in seen if mode == "train" for number in numbers) == list(range(16))
    assert [numbers for mode, _, numbers in seen if mode == "eval"] == [list(range(8))]
    expected = {"input_ids", "attention_mask", "labels", "use_cache", "fused_lm_head"}
    assert len(calls) >= 6 and all(keys == expected for keys in calls)


@needs_fused
def test_the_reference_runs_once(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Times)):
        trainer = build("dpo", data=ragged(), max_steps=2)
        runs: list[int] = []
        for model in (trainer.model, trainer.ref_model):
            model.model.register_forward_hook(lambda *_: runs.append(1))  # the layers, not the head
        trainer.train()
    assert len(runs) == 4


@needs_fused
def test_precomputed_references_go_with_fields_alone(train: Any, plugin: Any) -> None:
    """A plugin that rewrites nothing works with sums; what `evaluate` precomputes is clean of our key as well."""

    class Reads(Plugin):
        name = "reads"
        trainers = ("dpo",)
        needs = ("column:number",)

        @hookimpl
        def pair_metrics(self, pairs: Any) -> dict[str, tuple[float, float]]:
            assert pairs.ref_per_token_logps is None and "ref_chosen_logps" in pairs.batch
            return {"number": (sum(row["number"] for row in pairs.rows), len(pairs.rows))}

    peft = {"trainer": {"peft_config": LoraConfig(r=2, target_modules="all-linear")}}
    plain = train("dpo", data=ragged(), precompute_ref_log_probs=True, **peft)
    with trl_ext.enable(plugin(Reads)):
        ours = train("dpo", data=ragged(), precompute_ref_log_probs=True, **peft)
        found = ours.evaluate(ragged(4))
    expected = plain.evaluate(ragged(4))
    same(plain, ours)
    assert found["eval_loss"] == expected["eval_loss"]
    assert next(e for e in ours.state.log_history if "eval_loss" in e)["eval_reads/number"] == 1.5


@needs_fused
def test_precomputed_references_are_refused_for_rewriting(build: Any, plugin: Any) -> None:
    with (
        trl_ext.enable(plugin(Times)),
        pytest.raises(trl_ext.ConfigError, match=r"times rewrites the reference.*set precompute_ref_log_probs=False"),
    ):
        build("dpo", data=ragged(), precompute_ref_log_probs=True)


@needs_fused
def test_a_missing_column(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Times)):
        with pytest.raises(trl_ext.ConfigError, match="no column 'number'"):
            build("dpo")
        trainer = build("dpo", data=ragged())
        with pytest.raises(trl_ext.ConfigError, match=r"has no column 'number'.*Evaluation data"):
            trainer.evaluate(tiny_data("dpo"))


@needs_fused
def test_undo_gives_collator_and_columns_back(build: Any, plugin: Any) -> None:
    trainer = build("dpo", data=ragged())
    before = dict(vars(trainer))
    trl_ext.attach(trainer, plugin(Times))
    assert trainer.data_collator is not before["data_collator"]
    trainer.train()
    trl_ext.detach(trainer)
    assert trainer.data_collator is before["data_collator"]
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "completion_mask"}
    assert "number" not in trainer._signature_columns
