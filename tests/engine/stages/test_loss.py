"""Inputs of the loss and extra terms in real trainers: chains, scaling and accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def moved(trainer: Any, build: Any, kind: str = "grpo") -> float:
    fresh = dict(build(kind).model.named_parameters())
    return max((value - fresh[name]).abs().max().item() for name, value in trainer.model.named_parameters())


class HalveNegatives(Plugin):
    name = "halve-negatives"
    trainers = ROUNDS

    @hookimpl
    def loss_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
        advantages = batch["advantages"]
        batch["advantages"] = advantages * 0 + 99  # the copy may be spoiled
        return {"advantages": torch.where(advantages < 0, 0.5 * advantages, advantages)}


class AddOne(Plugin):
    name = "add-one"
    trainers = ROUNDS

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.seen: list[torch.Tensor] = []

    @hookimpl
    def loss_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
        self.seen.append(batch["advantages"].clone())
        return {"advantages": batch["advantages"] + 1}


class Same(Plugin):
    """What the two above do, once per round and so in the other place."""

    name = "same"
    trainers = ROUNDS

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        found = round.advantages
        return torch.where(found < 0, 0.5 * found, found) + 1


@pytest.mark.parametrize("kind", ROUNDS)
def test_loss_inputs_are_chained_on_copies(kind: str, build: Any, plugin: Any) -> None:
    settings = {"num_iterations": 2, "max_steps": 4}
    with trl_ext.enable(plugin(HalveNegatives), plugin(AddOne)):
        trainer = build(kind, **settings)
        trainer.train()
        seen = own(trainer, "add-one").seen
    assert torch.equal(seen[0], seen[1])  # the second pass over the round starts from the same numbers
    with trl_ext.enable(plugin(Same)):
        other = build(kind, **settings)
        other.train()
    assert_close_training(other, trainer, 1e-6)


def test_loss_inputs_of_pairs(build: Any, plugin: Any) -> None:
    class OnlyChosen(Plugin):
        name = "only-chosen"
        trainers = ("dpo",)

        @hookimpl
        def loss_inputs(self, batch: Any) -> dict[str, torch.Tensor]:
            mask = batch["completion_mask"].clone()
            mask[len(mask) // 2 :] = 0
            return {"completion_mask": mask}

    with trl_ext.enable(plugin(OnlyChosen)):
        trainer = build("dpo")
        trainer.train()
    assert logged(trainer, "logps/rejected") == [0.0, 0.0] and logged(trainer, "logps/chosen")[0] < -1


class One(Plugin):
    name = "one"
    trainers = ROUNDS

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        return {"constant": torch.tensor(1.0), "half": torch.tensor(0.5)}


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_constant_term_counts_once_whatever_the_accumulation(
    kind: str, accumulation: int, build: Any, plugin: Any
) -> None:
    settings = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    settings |= {"trainer": {"eval_dataset": tiny_data().select([0])}, "max_steps": 1, "learning_rate": 0.0}
    plain = build(kind, **settings)
    plain.train()
    plain.evaluate()
    with trl_ext.enable(plugin(One)):
        trainer = build(kind, **settings)
        trainer.train()
        trainer.evaluate()
    assert logged(trainer, "loss")[0] - logged(plain, "loss")[0] == pytest.approx(1.5, abs=1e-5)
    assert logged(trainer, "eval_loss")[0] - logged(plain, "eval_loss")[0] == pytest.approx(1.5, abs=1e-5)
    assert logged(trainer, "one/constant") == [1.0] and logged(trainer, "one/half") == [0.5]


class Pull(Plugin):
    """A term with a gradient that is a mean over rows."""

    name = "pull"
    trainers = ROUNDS

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        return {"pull": -(loss.per_token_logps * loss.mask).sum(1).mean()}

    @hookimpl
    def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
        return {"tokens": (loss.mask.sum().item(), len(loss.mask))}


@pytest.mark.parametrize(("kind", "settings"), [("grpo", {}), ("grpo", {"loss_type": "grpo"}), ("rloo", {})])
def test_terms_train_alike_for_1x8_and_8x1(kind: str, settings: Any, build: Any, plugin: Any) -> None:
    def run(rows: int, *references: str) -> Any:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows, "max_grad_norm": 1e9}
        with trl_ext.enable(*references):
            trainer = build(kind, max_steps=2, optim="sgd", learning_rate=1e-2, **sizes, **settings)
            trainer.train()
        return trainer

    term = plugin(Pull)
    whole, split = run(8, term), run(1, term)
    assert_close_training(whole, split, 2e-6)
    assert moved(whole, build, kind) > 1e-3
    for key in ("loss", "grad_norm", "pull/pull", "pull/tokens"):
        assert logged(split, key) == pytest.approx(logged(whole, key), rel=1e-4, abs=1e-6), key


def clipped(loss: Any) -> torch.Tensor:
    """(m, T) the stock surrogate with clipping to 0.2."""
    ratio = torch.exp(loss.per_token_logps - loss.old_per_token_logps)
    return -torch.min(ratio * loss.advantages, ratio.clamp(0.8, 1.2) * loss.advantages)


class Again(Plugin):
    """The stock loss once more, one value per token."""

    name = "again"
    trainers = ("grpo",)

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, PolicyLoss]:
        return {"again": PolicyLoss(clipped(loss))}


LOSS_TYPES = ["dapo", "grpo", "bnpo", "dr_grpo", "luspo"]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_term_per_token_is_averaged_as_the_trainer_averages(loss_type: str, build: Any, plugin: Any) -> None:
    """The stock loss a second time doubles loss and gradient, for every accumulation and reuse of rounds."""
    settings = {
        "loss_type": loss_type,
        "max_steps": 4,
        "num_iterations": 2,
        "learning_rate": 1e-6,
        "max_grad_norm": 1e9,
    }
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    settings |= {"trainer": {"eval_dataset": tiny_data().select([0, 1])}}
    plain = build(**settings)
    plain.train()
    plain.evaluate()
    with trl_ext.enable(plugin(Again)):
        trainer = build(**settings)
        trainer.train()
        trainer.evaluate()
    assert any(abs(loss) > 1e-3 for loss in logged(plain, "loss"))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert logged(trainer, key) == pytest.approx([2 * value for value in logged(plain, key)], abs=2e-5), key
    assert logged(trainer, "again/again") == pytest.approx(logged(plain, "loss"), abs=1e-5)


def test_terms_of_several_plugins_add_up(build: Any, plugin: Any) -> None:
    plain = build(max_steps=1)
    plain.train()
    with trl_ext.enable(plugin(One), plugin(Pull)):
        trainer = build(max_steps=1)
        trainer.train()
    extra = logged(trainer, "loss")[0] - logged(plain, "loss")[0]
    assert extra == pytest.approx(1.5 + logged(trainer, "pull/pull")[0], rel=1e-5)


def test_gdpo_trains_alike_for_1x8_and_8x1(build: Any) -> None:
    def run(rows: int) -> Any:
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 8 // rows}
        with trl_ext.enable("gdpo"):
            trainer = build(max_steps=2, optim="sgd", learning_rate=0.1, **sizes)
            trainer.train()
        return trainer

    whole, split = run(8), run(1)
    assert_close_training(whole, split, 2e-6)
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert moved(whole, build) > 1e-3
