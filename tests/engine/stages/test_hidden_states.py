"""Hidden states that plugins read in the policy's own forwards, and a step of their own: two hooks for critics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import ConfigError, PluginError
from trl_ext_hooks import Plugin, hookimpl


def direct(trainer: Any, batch: Any, where: torch.Tensor) -> torch.Tensor:
    """The same states from a forward of the backbone alone."""
    policy = trainer.unwrapped_model
    policy = policy.get_base_model() if hasattr(policy, "peft_config") else policy
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    was = policy.training
    policy.eval()  # no dropout; nothing else depends on it here
    with torch.no_grad():
        states = policy.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    policy.train(was)
    return states[:, batch["prompt_ids"].shape[1] - 1 : -1][where]


class Thirds(Plugin):
    """Reads every third token, and compares in rounds and losses."""

    name = "thirds"
    trainers = ("grpo", "rloo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.compared = {"round": 0, "loss": 0}
        self.forwards = 0

    @hookimpl
    def hidden_positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return (loss_mask != 0) & (loss_mask.cumsum(1) % 3 == 1)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.compare("round", round, round.loss_mask)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.compare("loss", loss, loss.mask)

    def compare(self, stage: str, found: Any, mask: torch.Tensor) -> None:
        states = found.hidden_states["thirds"]
        where = (mask != 0) & (mask.cumsum(1) % 3 == 1)
        assert not states.requires_grad and len(states) == int(where.sum()) > 0
        torch.testing.assert_close(states, direct(found.trainer, found.batch, where), atol=2e-5, rtol=0)
        self.compared[stage] += len(states)


class First(Plugin):
    """Reads another place beside it."""

    name = "first"
    trainers = ("grpo", "rloo")

    @hookimpl
    def hidden_positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        return (loss_mask != 0) & (loss_mask.cumsum(1) == 1)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        assert len(loss.hidden_states["first"]) == len(loss.mask)


def lora() -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("grpo", {}),
    "reused-rollouts": ("grpo", {"num_iterations": 2, "max_steps": 4}),
    "chunks": ("grpo", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "checkpointing": ("grpo", {"gradient_checkpointing": True}),
    "reentrant": (
        "grpo",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "lora-and-reference": ("grpo", {"trainer": lora, "beta": 0.1, "learning_rate": 0.1}),
    "reference": ("grpo", {"beta": 0.1}),
    "evaluation": ("grpo", {"eval": True}),
    "rloo": ("rloo", {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_states_are_those_of_the_policy(name: str, build: Callable[..., Any], plugin: Any) -> None:
    kind, settings = RUNS[name]
    settings = dict(settings)
    if callable(settings.get("trainer")):
        settings["trainer"] = settings["trainer"]()
    evaluate = settings.pop("eval", False)
    with trl_ext.enable(plugin(Thirds), plugin(First)):
        trainer = build(kind, max_completion_length=7, **{"max_steps": 2} | settings)
        if evaluate:
            trainer.evaluate(trainer.train_dataset.select(range(4)))
        trainer.train()
        compared = trainer._trl_ext.plugins["thirds"]
    assert compared.compared["round"] > 0 and compared.compared["loss"] > 0
    losses = trainer.state.global_step * trainer.args.gradient_accumulation_steps
    rounds = trainer.state.global_step // trainer.args.num_iterations if "num_iterations" in settings else losses
    if name == "chunks":
        rounds = 2
    assert compared.forwards == rounds + losses or evaluate  # nothing fires in generation or in reference forwards


def test_the_loss_is_that_of_plain_trl(train: Callable[..., Any], build: Callable[..., Any], plugin: Any) -> None:
    """Reading adds nothing to a run whose old log-probabilities exist anyway."""
    settings = {"num_iterations": 2, "max_steps": 4, "learning_rate": 0.05}
    plain = train("grpo", **settings)
    with trl_ext.enable(plugin(Thirds)):
        trainer = build("grpo", **settings)
        trainer.train()
    for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_forward_of_its_own_is_refused(plugin: Any) -> None:
    with pytest.raises(ConfigError, match="'first' reads hidden states of the policy's forward, and 'shared-prefix'"):
        trl_ext.enable("shared-prefix", plugin(First))


def test_positions_of_another_shape(build: Callable[..., Any], plugin: Any) -> None:
    class Wrong(First):
        name = "wrong"

        @hookimpl
        def hidden_positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
            return loss_mask[:, :1] != 0

    with trl_ext.enable(plugin(Wrong)), pytest.raises(PluginError, match=r"'wrong' returned torch.bool \(8, 1\) from"):
        build("grpo").train()


class Own(Plugin):
    """Counts the steps of the trainer's optimizer, and what its own parameter has got by then."""

    name = "own"
    trainers = ("grpo", "rloo", "dpo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.weight = torch.zeros((), requires_grad=True)
        self.gradients: list[float] = []
        self.steps: list[int] = []

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        return {"own": 3.0 * self.weight}

    @hookimpl
    def optimizer_step(self, trainer: Any) -> None:
        self.gradients.append(float(trainer.reduce(self.weight.grad)) if self.weight.grad is not None else 0.0)
        self.weight.grad = None


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_of_its_own(kind: Any, accumulation: int, build: Callable[..., Any], plugin: Any) -> None:
    with trl_ext.enable(plugin(Own)):
        sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
        trainer = build(kind, max_steps=3, **sizes)
        trainer.train()
        own = trainer._trl_ext.plugins["own"]
    assert own.gradients == pytest.approx([0.0 if kind == "dpo" else 3.0] * 3)


def test_it_ends_with_the_plugin(build: Callable[..., Any], plugin: Any) -> None:
    trainer = build("grpo")
    before = list(trainer.callback_handler.callbacks)
    trl_ext.attach(trainer, plugin(Own))
    own = trainer._trl_ext.plugins["own"]
    trl_ext.detach(trainer)
    assert trainer.callback_handler.callbacks == before
    trainer.train()
    assert own.gradients == []
