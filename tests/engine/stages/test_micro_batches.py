"""Statistics of a whole optimizer step: over every micro-batch of it, once, and without a trace in the losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, StepBatch, hookimpl


class Drift(Plugin):
    """KL(old || new) of the step, and what its losses then see."""

    name = "drift"
    trainers = ("grpo", "rloo")
    needs = ("old_logps",)

    def start(self) -> None:
        self.steps: list[float] = []
        self.losses: list[tuple[str, float, torch.Tensor, torch.Tensor]] = []
        self.ahead: list[torch.Tensor] = []

    @hookimpl
    def step_statistics(self, step: StepBatch) -> float:
        self.ahead += [loss.per_token_logps for loss in step.micro_batches]
        assert not any(loss.per_token_logps.requires_grad for loss in step.micro_batches)
        self.steps.append(float(step.token_mean(lambda loss: loss.old_per_token_logps - loss.per_token_logps)))
        step.log("kl", self.steps[-1])
        return self.steps[-1]

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        drift = loss.old_per_token_logps - loss.per_token_logps.detach()
        self.losses.append((loss.mode, loss.step_statistics[self.name], drift, loss.mask))
        self.losses[-1][2].now = loss.per_token_logps.detach()  # type: ignore[attr-defined]


SPLIT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.1}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("grpo", {"num_iterations": 2, "max_steps": 4}),
        # a round of three micro-batches in steps of two: the second step goes round the end of the buffer
        ("grpo", {"num_iterations": 2, "steps_per_generation": 3, "max_steps": 3}),
        ("rloo", {"num_iterations": 2, "max_steps": 2}),
    ],
)
def test_a_step_knows_all_its_micro_batches(kind: str, settings: dict[str, Any], train: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Drift)):
        trainer = train(kind, **SPLIT | settings)
        seen = trainer._trl_ext.plugins["drift"]
    assert len(seen.steps) == settings["max_steps"] == len(seen.losses) / 2
    for number, statistic in enumerate(seen.steps):
        losses = seen.losses[2 * number : 2 * number + 2]
        assert [known for _, known, _, _ in losses] == [statistic] * 2
        total = sum((drift.double() * mask).sum() for _, _, drift, mask in losses)
        assert statistic == pytest.approx(float(total / sum(mask.sum() for *_, mask in losses)), abs=1e-12)
    for ahead, (_, _, drift, _) in zip(seen.ahead, seen.losses, strict=True):
        assert torch.equal(ahead, drift.now)  # the very numbers that the loss then has
    assert seen.steps[0] == pytest.approx(0, abs=1e-6) and abs(seen.steps[1]) > 1e-4
    logged = [entry["drift/kl"] for entry in trainer.state.log_history if "drift/kl" in entry]
    assert logged == pytest.approx(seen.steps)


class Softmax(Plugin):
    """The log of the mean of exp over all rows of a step, of which a micro-batch has a part only."""

    name = "softmax"
    trainers = ("grpo",)

    @staticmethod
    def scores(loss: Any) -> torch.Tensor:
        return (loss.per_token_logps * loss.mask).sum(1)

    @hookimpl
    def step_statistics(self, step: StepBatch) -> torch.Tensor:
        rows = torch.cat([self.scores(loss) for loss in step.micro_batches])
        return rows.softmax(0).view(len(step.micro_batches), -1)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        weights = loss.step_statistics[self.name]
        return PolicyLoss((weights[loss.position] * self.scores(loss)).sum() * len(weights), "share")


def test_a_loss_that_couples_all_rows_of_a_step(train: Any, plugin: Any) -> None:
    runs = []
    for rows, parts in ((8, 1), (4, 2), (2, 4)):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        with trl_ext.enable(plugin(Softmax)):
            runs.append(train(optim="sgd", learning_rate=0.1, max_steps=1, max_grad_norm=1e9, **sizes))
    for other in runs[1:]:
        for one, value in zip(runs[0].model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(value, one, atol=1e-5, rtol=0)
    gradients = [run.state.log_history[0]["grad_norm"] for run in runs]
    assert gradients[0] > 0.1 and gradients == pytest.approx([gradients[0]] * 3, rel=1e-3)


class Idle(Plugin):
    name = "idle"
    trainers = ("grpo", "rloo")

    @hookimpl
    def step_statistics(self, step: StepBatch) -> None:
        torch.rand(1)


class Nothing(Plugin):
    name = "nothing"
    trainers = ("grpo", "rloo")


def test_the_pass_leaves_no_trace_with_dropout_and_costs_nothing_unless_asked_for(
    model: str, build: Any, plugin: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def run(cls: type[Plugin]) -> tuple[dict[str, torch.Tensor], int]:
        policy = AutoModelForCausalLM.from_pretrained(model, attention_dropout=0.3)
        given = {"model": policy, "processing_class": AutoTokenizer.from_pretrained(model)}
        forwards: list[int] = []
        with trl_ext.enable(plugin(cls)):
            trainer = build(trainer=given, max_steps=2, num_iterations=2, **SPLIT)
            trainer.model.base_model.register_forward_hook(lambda *args: forwards.append(1))
            trainer.train()
        return {name: value.detach().clone() for name, value in policy.named_parameters()}, len(forwards)

    (idle, counted), (plain, fewest), (again, _) = run(Idle), run(Nothing), run(Nothing)
    assert all(torch.equal(idle[name], plain[name]) and torch.equal(again[name], plain[name]) for name in plain)
    assert counted == fewest + 4


def test_in_evaluation_a_batch_is_a_step(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Drift)):
        data = {"eval_dataset": tiny_data().select(range(4))}
        trainer = build(trainer=data, num_generations_eval=2, per_device_eval_batch_size=4, max_steps=1, **SPLIT)
        trainer.train()
        trainer.evaluate()
        seen = trainer._trl_ext.plugins["drift"]
    evaluated = [entry for entry in seen.losses if entry[0] == "eval"]
    assert len(evaluated) == 2 and [known for _, known, *_ in evaluated] == seen.steps[1:]
    assert seen.steps[1:] == pytest.approx([0, 0], abs=1e-6)  # each was sampled by the policy as it is


def test_a_training_that_was_stopped_inside_a_step_leaves_its_statistics_behind(build: Any, plugin: Any) -> None:
    class Stop(Drift):
        name = "stop"
        stops = True

        @hookimpl
        def loss_terms(self, loss: Any) -> None:
            if self.stops:
                raise KeyboardInterrupt

    with trl_ext.enable(plugin(Stop)):
        trainer = build(max_steps=1, **SPLIT)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        seen = trainer._trl_ext.plugins["stop"]
        seen.stops = False
        trainer.train()
    assert len(seen.steps) == 2 and len(seen.losses) == 2


def test_steps_that_take_rows_of_two_rounds_are_refused(build: Any, plugin: Any) -> None:
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 1}
    expected = "drift looks at all rows of an optimizer step before its losses, and with gradient_accumulation_steps=2"
    with trl_ext.enable(plugin(Drift)):
        with refused(trl_ext.ConfigError, expected, "a multiple of gradient_accumulation_steps"):
            build(**settings)
        build(num_iterations=2, **settings)


def test_a_trainer_with_micro_batches_of_its_own_is_told(build: Any, plugin: Any) -> None:
    from trl import GRPOTrainer

    class Copies(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, {**inputs, "completion_ids": inputs["completion_ids"].clone()})

    with trl_ext.enable(plugin(Drift)), refused(trl_ext.CompatError, "Copies computes a loss of rows that are not"):
        build(cls=Copies).train()
