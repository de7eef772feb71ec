"""Dynamic reward weighting in real trainers: its numbers, a resume, and the limits in which it is GRPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import metrics_of
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_plugins.dynamic_weights import DynamicWeights
from trl_ext_plugins.dynamic_weights.maths import clipped_gradients, contribution, influences, moved_weights, multiplier

SAVE = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def parameters(trainer: Any) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in trainer.model.parameters()])


def resumed_from_the_first_step(trainer: Any, build: Any, kind: str, **settings: Any) -> None:
    again = build(kind, **settings)
    again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
    assert torch.equal(parameters(again), parameters(trainer))
    ours, theirs = (run._trl_ext.plugins["dynamic-weights"] for run in (again, trainer))
    for name in DynamicWeights.state:
        assert getattr(ours, name) == getattr(theirs, name)
    for one, other in zip(metrics_of(again)[1:3], metrics_of(trainer)[1:3], strict=True):
        assert one == other


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_advantages_follow_the_hypervolume(kind: str, train: Any, build: Any, look: str) -> None:
    settings = {**SAVE, "beta": 0.0}
    with trl_ext.enable("dynamic-weights", look, dynamic_weights={"normalise": False}):
        trainer = train(kind, **settings)
        rounds = trainer._trl_ext.plugins["look"].rounds
        resumed_from_the_first_step(trainer, build, kind, **settings)
    reference, *points = [round.rewards.double().mean(0).tolist() for round in rounds]
    expected, archive = [1.0], []
    for point in points:
        gain = contribution(point, archive, reference)
        archive += [point] if gain else []
        expected.append(multiplier(gain))
    assert [entry["dynamic-weights/factor"] for entry in trainer.state.log_history[:3]] == pytest.approx(expected)
    for factor, round in zip(expected, rounds, strict=True):
        groups = round.rewards.double().sum(1).view(-1, 4)
        base = groups - groups.mean(1, keepdim=True)
        base = base / (groups.std(1, keepdim=True) + 1e-4) if kind == "grpo" else base * 4 / 3
        torch.testing.assert_close(round.advantages.double(), factor * base.flatten(), atol=1e-5, rtol=1e-5)
    assert min(expected) < 1


class Gradients(Plugin):
    """Reads, before each update of the weights, the gradients of single rewards and that of the trainer's loss."""

    name = "gradients"
    trainers = ("grpo", "rloo")
    watched: Any = None

    def start(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor, list[float], float]] = []

    @hookimpl
    def optimizer_step(self, trainer: Any) -> None:
        if self.watched is None:
            return
        whole = torch.cat([value.grad.flatten() for value in trainer.unwrapped_model.parameters()])
        single = self.watched._gradients / self.watched._tokens
        self.seen.append((single, whole, self.watched.weights, trainer.learning_rate))


def test_weights_follow_the_gradients(build: Any, plugin: Any, look: str) -> None:
    """The sum of the single gradients with their weights is the gradient of the loss, which is one token mean."""
    settings = {**SAVE, "scale_rewards": "none", "loss_type": "dapo", "max_grad_norm": 0.0, "beta": 0.0}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    settings |= {"reward_weights": [2.0, 1.0], "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    requests: dict[str, Any] = {plugin(Gradients): None, "dynamic-weights": {"way": "gradient", "regularization": 1e-4}}
    with trl_ext.enable({**requests, look: None}):
        trainer = build(**settings)
        own = trainer._trl_ext.plugins
        own["gradients"].watched = own["dynamic-weights"]
        trainer.train()
        seen, rounds = own["gradients"].seen, own["look"].rounds
        last = own["dynamic-weights"].weights
        resumed_from_the_first_step(trainer, build, "grpo", **settings)
    assert seen[0][2] == pytest.approx([2 / 3, 1 / 3])
    weights = [entry[2] for entry in seen] + [last]
    for place, (single, whole, now, rate) in enumerate(seen):
        torch.testing.assert_close(3 * torch.tensor(now) @ single, whole, atol=1e-6, rtol=1e-4)
        influence = influences(clipped_gradients(single, 0.0)).double()
        after = moved_weights(torch.tensor(now, dtype=torch.float64), influence, rate / 1e-4)
        assert weights[place + 1] == pytest.approx(after.tolist(), rel=1e-4)
        torch.testing.assert_close(rounds[place].reward_weights, 3 * torch.tensor(now), atol=1e-5, rtol=1e-5)
        logged = trainer.state.log_history[place]
        assert logged["dynamic-weights/weight/digits"] == pytest.approx(now[0])
        assert ("dynamic-weights/influence/digits" in logged) == (place > 0)
    assert [rate for *_, rate in seen] == pytest.approx([1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert abs(last[0] - 2 / 3) > 1e-3 and sum(last) == pytest.approx(1)


def test_weights_that_do_not_move_are_those_of_trl(train: Any) -> None:
    plain = train()
    with trl_ext.enable(dynamic_weights={"way": "gradient", "regularization": 1e12}):
        still = train()
    assert (parameters(plain) - parameters(still)).abs().max() <= 1e-6


def test_weights_move_on_rloo(train: Any) -> None:
    plain = train("rloo")
    with trl_ext.enable(dynamic_weights={"way": "gradient", "regularization": 1e-4, "parameters": "layers.1"}):
        moving = train("rloo")
    assert moving.state.log_history[1]["dynamic-weights/weight/digits"] > 0.51
    assert (parameters(plain) - parameters(moving)).abs().max() > 1e-4
