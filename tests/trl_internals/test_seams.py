"""A TRL that cannot be extended."""

from __future__ import annotations

from typing import Any

import pytest
from trl import GRPOTrainer

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import Rolls, Terms, checking
from trl_ext import CompatError, api
from trl_ext.trl_internals import seams


@pytest.mark.parametrize("version", ["1.9.3", "1.17.0", "2.0"])
def test_a_version_outside_the_range(version: str, build: Any, monkeypatch: Any) -> None:
    trainer = build()
    monkeypatch.setattr("trl.__version__", version)
    monkeypatch.delenv(seams.OVERRIDE, raising=False)
    expected = [f"trl {version} is outside the supported range >=1.10,<1.17", f"set {seams.OVERRIDE}=1 to try"]
    for way in (
        lambda: trl_ext.enable("gdpo"),
        lambda: trl_ext.attach(trainer, "gdpo"),
        lambda: trl_ext.extend(GRPOTrainer, "gdpo"),
    ):
        with refused(CompatError, *expected):
            way()
    assert api._active is None and type(trainer) is GRPOTrainer


def test_the_override_of_the_version(build: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("trl.__version__", "1.17.0")
    monkeypatch.setenv(seams.OVERRIDE, "1")
    with pytest.warns(UserWarning, match=r"outside the supported range.* Continuing because"), trl_ext.enable("gdpo"):
        build(max_steps=1).train()
    monkeypatch.setenv(seams.OVERRIDE, "yes")
    with refused(CompatError, "is outside the supported range"):
        trl_ext.enable("gdpo")


def test_a_missing_seam(build: Any, plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr(GRPOTrainer, "_calculate_rewards")
    texts = [
        f"trl {seams.trl_version()} cannot be extended",
        "GRPOTrainer._calculate_rewards is missing (needed by: advantages, rewards, round_metrics)",
        "Tested: trl 1.10.0",
    ]
    for way in (lambda: trl_ext.enable("gdpo"), lambda: trl_ext.extend(GRPOTrainer, "gdpo")):
        with refused(CompatError, *texts):
            way()
    assert api._active is None
    trl_ext.enable(plugin(Terms)).disable()  # does not need that one
    monkeypatch.delattr(GRPOTrainer, "_save_checkpoint")
    trl_ext.enable(plugin(Terms)).disable()  # inherited from transformers


def test_a_seam_with_other_parameters(plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, batch: None)
    with refused(CompatError, "GRPOTrainer._compute_loss lacks the parameter 'inputs' (needed by: loss_terms)"):
        trl_ext.enable(plugin(Terms))
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, *args, **kwargs: None)
    trl_ext.enable(plugin(Terms)).disable()


def test_a_missing_function_of_the_module(plugin: Any, monkeypatch: Any) -> None:
    monkeypatch.delattr("trl.trainer.grpo_trainer.shuffle_sequence_dict")
    expected = "trl.trainer.grpo_trainer.shuffle_sequence_dict is missing (needed by: grouped_order)"
    with refused(CompatError, expected):
        trl_ext.enable(plugin(checking(needs=("grouped_order",), trainers=("grpo",))))
    trl_ext.enable("gdpo").disable()


def test_a_seam_that_everything_needs(monkeypatch: Any) -> None:
    monkeypatch.setattr(GRPOTrainer, "training_step", None)
    with refused(CompatError, "GRPOTrainer.training_step is missing (needed by: every plugin)"):
        trl_ext.enable("gdpo")


def test_generation_with_another_layout(build: Any, plugin: Any, monkeypatch: Any) -> None:
    original = GRPOTrainer._generate
    monkeypatch.setattr(GRPOTrainer, "_generate", lambda self, prompts: (*original(self, prompts), None))
    with trl_ext.enable(plugin(Rolls)):
        trainer = build()
        with refused(CompatError, "GRPO generation returned 9 values, expected 8"):
            trainer.train()
