"""Trainer classes of users that wrap, or replace, the loss which plugins act on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trl import GRPOTrainer, RLOOTrainer

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import OwnLoss, checking
from trl_ext import ConfigError, PluginError
from trl_ext_hooks import Plugin, PolicyLoss, Require, hookimpl

CLASSES = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


def with_term(kind: str) -> type[Any]:
    class WithTerm(CLASSES[kind]):  # type: ignore[misc]
        """Doubles the loss and adds a term with a gradient, a metric and a second forward."""

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            ids, mask = inputs["completion_ids"], inputs["completion_mask"]
            logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, ids.shape[1] - 1)
            self._metrics["train"]["own"].append(7.0)
            return 2 * super()._compute_loss(model, inputs) - 0.1 * logps.mean() + 0.5

    return WithTerm


class SameLoss(Plugin):
    """Replaces the loss by what it is already in the first step: minus advantage times ratio."""

    name = "same-loss"
    trainers = ("grpo", "rloo")

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        difference = (loss.per_token_logps - loss.old_per_token_logps) * loss.mask
        if "num_items_in_batch" in loss.batch:
            return PolicyLoss(-loss.advantages * difference.exp())
        return PolicyLoss(-(difference.sum(1).exp() * loss.advantages.squeeze(1)).mean())


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_what_a_class_of_the_user_makes_of_the_loss_stays(kind: str, train: Any, plugin: Any) -> None:
    settings = {"beta": 0.0, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}
    plain, wrapped = train(kind, **settings), train(kind, cls=with_term(kind), **settings)
    with trl_ext.enable(plugin(SameLoss)):
        replaced = train(kind, cls=with_term(kind), **settings)
    assert logged(replaced, "loss") == pytest.approx(logged(wrapped, "loss"), abs=1e-5)
    assert logged(replaced, "own") == [7.0, 7.0]
    torch.testing.assert_close(parameters(replaced), parameters(wrapped), atol=1e-5, rtol=0)
    assert (parameters(plain) - parameters(wrapped)).abs().max() > 1e-3


def test_hidden_states_beside_a_second_forward(train: Any, plugin: Any) -> None:
    class States(Plugin):
        name = "states"
        trainers = ("grpo",)

        @hookimpl
        def hidden_positions(self, loss_mask: Any) -> Any:
            return loss_mask != 0

        @hookimpl
        def loss_metrics(self, loss: Any) -> None:
            assert len(loss.hidden_states[self.name]) == int(loss.mask.sum())

    with trl_ext.enable(plugin(States)):
        train(cls=with_term("grpo"), max_steps=1)


@pytest.mark.parametrize("name", ["p3o", "trpa"])
def test_a_term_beside_the_losses_of_built_in_plugins(name: str, train: Any) -> None:
    class WithTerm(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            return super()._compute_loss(model, inputs) + 0.5

    def preference_level(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0 + row % 2 for row in range(len(completions))]

    with trl_ext.enable(name):
        losses = [
            logged(train(cls=cls, rewards=[preference_level], max_steps=1), "loss")[0] for cls in (None, WithTerm)
        ]
    assert losses[1] - losses[0] == pytest.approx(0.5, abs=1e-6)


def test_a_class_may_give_the_loss_other_inputs(train: Any, plugin: Any) -> None:
    class Half(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            half = {name: value[:4] if name != "num_items_in_batch" else value for name, value in inputs.items()}
            return super()._compute_loss(model, half)

    sizes = []

    class Sizes(OwnLoss):
        honours = ("loss_type",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            sizes.append((len(loss.per_token_logps), len(loss.batch["advantages"])))
            return PolicyLoss(-loss.advantages * loss.per_token_logps)

    with trl_ext.enable(plugin(Sizes)):
        train(cls=Half, max_steps=1)
    assert sizes == [(4, 4)]


def test_a_class_that_calls_the_loss_from_elsewhere(train: Any, plugin: Any) -> None:
    class Elsewhere(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **settings: Any) -> Any:
            return super()._compute_loss(model, inputs) + 0.25

    with trl_ext.enable(plugin(SameLoss)):
        ours = logged(train(cls=Elsewhere, max_steps=1), "loss")
    assert ours == pytest.approx([value + 0.25 for value in logged(train(max_steps=1), "loss")], abs=1e-6)


# --- classes that replace the loss ------------------------------------------------------------------------------------


class Replaces(GRPOTrainer):
    """A loss of its own, with one advantage per row and a mean over rows."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logps, *_ = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
        return -(inputs["advantages"] * logps.mean(1)).mean()


class Hidden(Replaces):
    """Its code names `super`, so only a run shows that TRL's loss is not called."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        return super()._compute_loss(model, inputs)


class HiddenAlone(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        assert super()._prepare_inputs is not None
        return Replaces._compute_loss(self, model, inputs)  # type: ignore[arg-type]


class Explicit(GRPOTrainer):
    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        return GRPOTrainer._compute_loss(self, model, inputs)


class OtherEntrance(GRPOTrainer):
    """Never asks for `_compute_loss`."""

    def compute_loss(self, model: Any, inputs: Any, **settings: Any) -> Any:
        return Replaces._compute_loss(self, model, inputs)  # type: ignore[arg-type]


class Drops(Plugin):
    name = "drops"
    trainers = ("grpo",)

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return round.group_ids == 0


class Tokens(Plugin):
    name = "tokens"
    trainers = ("grpo",)
    needs = ("token_advantages",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return round.token_advantages


class Undeclared(Tokens):
    needs = ()


def requires_loss_type() -> type[Plugin]:
    return checking(Require("loss_type", ("dapo",), "it rests on the mean"))


RESTING = [Drops, Tokens, requires_loss_type(), OwnLoss]


def unloaded(cls: type[Any]) -> type[Any]:
    """A class whose constructor fails once it loads a model."""

    class Unloaded(cls):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given | {"model": "/no/such/model"})

    return Unloaded


@pytest.mark.parametrize("cls", [Replaces, Hidden])
@pytest.mark.parametrize("resting", RESTING, ids=lambda made: made.name)
def test_plugins_that_need_trls_loss_are_refused_before_a_model_is_loaded(
    resting: Any, cls: Any, build: Any, plugin: Any
) -> None:
    with trl_ext.enable(plugin(resting)):
        with refused(ConfigError, f"plugin {resting.name!r}", "Replaces._compute_loss"):
            build(cls=unloaded(cls))
        build()


@pytest.mark.parametrize("name", ["thinkless", "decs", "spae", "hdpo"])
def test_built_in_plugins_beside_trls_gmpo(name: str, build: Any) -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    given = {"rollout_func": lambda prompts, trainer: {}} if name == "hdpo" else {}
    options = {"call_tag": "<call>"} if name == "hdpo" else {}
    with trl_ext.enable(name, **{name: options}), refused(ConfigError, name, "GMPOTrainer._compute_loss replaces it"):
        build(cls=unloaded(gmpo.GMPOTrainer), trainer=given)


def test_plugins_that_do_not_need_trls_loss_train_beside_another_one(train: Any) -> None:
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    with trl_ext.enable("gdpo"):
        trainer = train(cls=gmpo.GMPOTrainer, max_steps=1)
    assert logged(trainer, "gdpo/zero_std/digits")


@pytest.mark.parametrize("cls", [HiddenAlone, Explicit, OtherEntrance])
@pytest.mark.parametrize("resting", RESTING, ids=lambda made: made.name)
def test_what_only_a_run_shows_stops_it_in_the_first_step(cls: Any, resting: Any, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(resting)):
        trainer = build(cls=cls)
        with pytest.raises(PluginError) as caught:
            trainer.train()
    assert f"{resting.name}" in str(caught.value) and cls.__name__ in str(caught.value)
    assert trainer.state.global_step == 0


def test_advantages_per_token_without_a_declared_need(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Undeclared)):
        trainer = build(cls=Replaces)
        with refused(
            PluginError, "Replaces did not call TRL's `_compute_loss` by super(), which plugin 'tokens' needs"
        ):
            trainer.train()


@pytest.mark.parametrize("normalisation", ["trainer", "token_mean"])
def test_terms_beside_a_replaced_loss(normalisation: Any, build: Any, plugin: Any) -> None:
    class Term(Plugin):
        name = "term"
        trainers = ("grpo",)

        @hookimpl
        def loss_terms(self, loss: Any) -> dict[str, PolicyLoss]:
            return {"one": PolicyLoss(torch.ones_like(loss.per_token_logps), normalisation)}

    plain = build(cls=Replaces, max_steps=1)
    plain.train()
    with trl_ext.enable(plugin(Term)), pytest.warns(UserWarning, match="replaces TRL's method"):
        trainer = build(cls=Replaces, max_steps=1)
        if normalisation == "trainer":
            with refused(PluginError, "which plugin 'term' needs"):
                trainer.train()
            return
        trainer.train()
    assert logged(trainer, "loss")[0] - logged(plain, "loss")[0] == pytest.approx(1.0, abs=1e-6)


def test_a_trainer_gets_its_class_back(build: Any, plugin: Any) -> None:
    for cls in (None, with_term("grpo")):
        trainer = build(cls=cls)
        own = type(trainer)
        trl_ext.attach(trainer, plugin(OwnLoss))
        assert type(trainer) is not own and isinstance(trainer, own)
        trl_ext.detach(trainer)
        assert type(trainer) is own
