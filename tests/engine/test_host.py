"""Trainers of the user in which hooks cannot run, and what `setup` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOTrainer

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import OwnLoss, Rolls, Terms
from trl_ext import ConfigError, PluginError
from trl_ext.plan.stages import ROUNDS
from trl_ext_hooks import (
    Plugin,
    Refuse,
    Warn,
    hookimpl,
)


def test_what_setup_refuses(build: Any, plugin: Any) -> None:
    events: list[str] = []

    class Late(Plugin):
        name = "late"
        trainers = ROUNDS

        @hookimpl
        def setup(self, trainer: Any) -> Any:
            yield Refuse(f"{trainer.processing_class.eos_token} is not to my taste.", "Take another model.")
            yield Refuse("Nor is the weather.", "Wait.")

        @hookimpl
        def teardown(self) -> None:
            events.append("teardown")

    class Wrong(Plugin):
        name = "wrong"
        trainers = ROUNDS

        @hookimpl
        def setup(self) -> Any:
            return [Warn("x")]

    texts = ["this run cannot work:\n", "  - late: <|im_end|> is not to my taste. Take another model.\n", "late: Nor"]
    with trl_ext.enable(plugin(Late)), refused(ConfigError, *texts):
        build()
    assert events == ["teardown"]
    with trl_ext.enable(plugin(Wrong)), refused(PluginError, "plugin 'wrong': `setup` returned Warn(message='x')"):
        build()


class OwnScores(GRPOTrainer):
    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        return torch.rand(len(prompts), len(self.reward_funcs))


class OwnTrainingLoss(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
        return sum(p.sum() for p in model.parameters()) * 0.0


def test_an_override_that_is_in_front_of_ours_is_fine(build: Any, plugin: Any) -> None:
    """Our classes go in front of the user's, so an override below is wrapped like TRL's own method, and named."""
    with (
        trl_ext.enable("gdpo"),
        pytest.warns(UserWarning, match=r"OwnScores\._calculate_rewards replaces TRL's method"),
    ):
        trainer = build(cls=OwnScores)
    with trl_ext.enable("gdpo"), pytest.warns(UserWarning):
        trainer = build(cls=OwnScores)
        trainer.train()
    assert any("gdpo/zero_std/digits" in entry for entry in trainer.state.log_history)


class SkipsScoring(GRPOTrainer):
    """A whole round of its own, which never asks for rewards."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        rows = len(inputs)
        ids = torch.full((rows, 4), 50)
        ones = torch.ones(rows, 4, dtype=torch.long)
        batch = {"prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": ones}
        return {**batch, "advantages": torch.zeros(rows), "num_items_in_batch": ones.sum()}


def test_a_round_that_is_never_scored(build: Any, plugin: Any) -> None:
    with trl_ext.enable("gdpo"), pytest.warns(UserWarning, match=r"SkipsScoring\._generate_and_score_completions"):
        trainer = build(cls=SkipsScoring)
        with refused(PluginError, "SkipsScoring finished a round without scoring it", "so plugins gdpo cannot act"):
            trainer.train()


def test_hooks_that_never_ran_stop_the_run_after_the_first_step(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Rolls)), pytest.warns(UserWarning):
        trainer = build(cls=SkipsScoring)
        with refused(
            PluginError,
            "the first training step ended and these hooks never ran: rolls.rollout.",
            "A subclass that overrides TRL's private methods must call super()",
        ):
            trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_that_bypasses_the_log_probabilities(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Terms)), pytest.warns(UserWarning, match=r"OwnTrainingLoss\._compute_loss"):
        trainer = build(cls=OwnTrainingLoss)
        with refused(PluginError, "computed its loss without TRL's log-probability method, so terms cannot act"):
            trainer.train()


def test_two_replaced_losses(build: Any, plugin: Any) -> None:
    expected = "plugin 'own-loss' replaces the policy loss, and so does OwnTrainingLoss._compute_loss. Leave one out."
    with trl_ext.enable(plugin(OwnLoss)):
        with refused(ConfigError, expected):
            build(cls=OwnTrainingLoss)
        assert build().train() is not None


def test_an_override_that_calls_super_is_no_matter(build: Any, plugin: Any, recwarn: Any) -> None:
    class Polite(GRPOTrainer):
        def _calculate_rewards(self, *args: Any) -> Any:
            return super()._calculate_rewards(*args) * 2

    with trl_ext.enable("gdpo"):
        build(cls=Polite).train()
    assert not [entry for entry in recwarn if "replaces TRL's method" in str(entry.message)]


def test_another_trainer_class() -> None:
    with refused(ConfigError, "dict is none of TRL's GRPOTrainer, RLOOTrainer and DPOTrainer, nor a subclass"):
        trl_ext.extend(dict, "gdpo")
