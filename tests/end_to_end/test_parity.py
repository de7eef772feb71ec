"""Stock TRL stays stock: with idle plugins a run is bit-identical to plain TRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.catalog.declaration import HOOKS
from trl_ext.plan.stages import NO_STAGE, SERVED
from trl_ext.testing import digits, metrics_of
from trl_ext.trl_internals import seams
from trl_ext_hooks import Plugin, hookimpl

KINDS = ("grpo", "rloo", "dpo")
NEEDS_FUSED = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs TRL 1.15")


class Silent(Plugin):
    """No hooks at all."""

    name = "silent"
    trainers = KINDS


class Observer(Plugin):
    """Every hook with an idle form: `policy_loss` and `run` replace something, `trainer_arguments` is for GRPO only."""

    name = "observer"
    trainers = KINDS
    fields = ("unused",)

    @hookimpl
    def configure(self, config: Any) -> None:
        return None

    @hookimpl
    def reward_columns(self, names: Any) -> None:
        return None

    @hookimpl
    def mix_advantages(self, round: Any, parts: Any) -> None:
        return None

    @hookimpl
    def setup(self, trainer: Any) -> None:
        torch.randn(100)  # must not move the random stream of training

    @hookimpl
    def teardown(self, trainer: Any) -> None:
        return None

    @hookimpl
    def select_rows(self, rows: Any, trainer: Any) -> None:
        return None

    @hookimpl
    def rollout(self, prompts: Any, generate: Any, trainer: Any) -> Any:
        return generate(prompts)

    @hookimpl
    def annotate(self, rollout: Any) -> None:
        return None

    @hookimpl
    def rewards(self, scored: Any) -> None:
        return None

    @hookimpl
    def advantages(self, round: Any) -> None:
        return None

    @hookimpl
    def keep_rows(self, round: Any) -> None:
        return None

    @hookimpl
    def token_mask(self, round: Any) -> None:
        return None

    @hookimpl
    def token_weights(self, round: Any) -> None:
        return None

    @hookimpl
    def batch_fields(self, round: Any) -> None:
        return None

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Any:
        return compute()

    @hookimpl
    def loss_inputs(self, batch: Any, trainer: Any) -> None:
        return None

    @hookimpl
    def side_batch(self, trainer: Any) -> None:
        return None

    @hookimpl
    def step_statistics(self, step: Any) -> None:
        torch.randn(100)

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        return None

    @hookimpl
    def optimizer_step(self, trainer: Any) -> None:
        return None

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        return None

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        return None

    @hookimpl
    def inspect(self, round: Any) -> None:
        return None

    @hookimpl
    def pair_batch(self, pairs: Any) -> None:
        return None

    @hookimpl
    def pair_logps(self, pairs: Any) -> None:
        return None

    @hookimpl
    def pair_metrics(self, pairs: Any) -> None:
        return None

    @hookimpl
    def state_dict(self) -> None:
        return None

    @hookimpl
    def load_state_dict(self, state: Any) -> None:
        return None


class PairObserver(Observer):
    """For DPO before TRL 1.15, whose forward nobody can own."""

    logps = pair_logps = pair_metrics = None


def lora() -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)}


def constant(completions: list[Any], **kwargs: Any) -> list[float]:
    """Equal float32 numbers: TRL makes advantages of 7e-5 out of their rounding errors."""
    return [0.1] * len(completions)


def sometimes(completions: list[Any], **kwargs: Any) -> list[float | None]:
    """None for every other completion."""
    return [None if i % 2 else float(len(str(completion)) % 5) for i, completion in enumerate(completions)]


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"max_steps": 4}),
    "grpo-kl": ("grpo", {"beta": 0.1, "loss_type": "grpo"}),
    "grpo-reuse": ("grpo", {"max_steps": 5, "num_iterations": 2, "gradient_accumulation_steps": 2}),
    "grpo-accumulation": (
        "grpo",
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 3, "loss_type": "bnpo"},
    ),
    "grpo-lora": ("grpo", {"trainer": lora, "beta": 0.05, "max_steps": 3, "learning_rate": 0.1}),
    "grpo-eval": ("grpo", {"eval": True, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}),
    "grpo-none": ("grpo", {"rewards": [digits, sometimes]}),
    "grpo-noise": ("grpo", {"rewards": [constant], "num_generations": 7, "per_device_train_batch_size": 14}),
    "grpo-checkpointing": ("grpo", {"gradient_checkpointing": True, "max_steps": 3}),
    "rloo": ("rloo", {"max_steps": 4}),
    "rloo-reuse": ("rloo", {"beta": 0.0, "num_iterations": 2, "gradient_accumulation_steps": 2, "max_steps": 4}),
    "rloo-lora": ("rloo", {"trainer": lora, "max_steps": 3, "learning_rate": 0.1}),
    "dpo": ("dpo", {}),
    "dpo-lora": ("dpo", {"trainer": lora, "gradient_accumulation_steps": 2}),
}


@dataclasses.dataclass
class Outcome:
    parameters: dict[str, torch.Tensor]
    metrics: list[dict[str, Any]]
    texts: list[Any]
    logs: dict[str, Any]
    random: torch.Tensor


def outcome(build: Callable[..., Any], name: str) -> Outcome:
    kind, settings = RUNS[name]
    settings = dict(settings)
    if callable(settings.get("trainer")):
        settings["trainer"] = settings["trainer"]()
    if settings.pop("eval", False):
        from trl_ext.testing import tiny_data

        settings["trainer"] = {"eval_dataset": tiny_data("grpo", 4)}
    torch.manual_seed(5)  # before TRL 1.15 an adapter is made before the trainer seeds
    trainer = build(kind, **settings)
    texts: list[Any] = []
    if kind != "dpo":
        scored = trainer.reward_funcs[0]
        trainer.reward_funcs = list(trainer.reward_funcs)

        def keep(completions: list[Any], **kwargs: Any) -> list[float]:
            texts.extend(message["content"] for (message,) in completions)
            return scored(completions=completions, **kwargs)

        trainer.reward_funcs[0] = keep
    trainer.train()
    logs = getattr(trainer, "_logs", None)
    return Outcome(
        parameters={n: p.detach().clone() for n, p in trainer.model.named_parameters()},
        metrics=metrics_of(trainer),
        texts=texts,
        logs={k: [str(v) for v in logs[k]] for k in ("prompt", "completion", "advantages")} if logs else {},
        random=torch.get_rng_state(),
    )


stock: dict[str, Outcome] = {}


@pytest.mark.parametrize("idle", [Silent, Observer], ids=["no-hooks", "observer"])
@pytest.mark.parametrize("name", RUNS)
def test_an_idle_plugin_changes_no_bit(
    name: str, idle: type[Plugin], build: Callable[..., Any], plugin: Callable[[type], str]
) -> None:
    if name not in stock:
        stock[name] = outcome(build, name)
    plain = stock[name]
    if idle is Observer and RUNS[name][0] == "dpo" and seams.trl_version() < seams.Version("1.15"):
        idle = PairObserver
    with trl_ext.enable(plugin(idle)):
        found = outcome(build, name)
    assert found.parameters.keys() == plain.parameters.keys()
    for key, value in plain.parameters.items():
        assert torch.equal(found.parameters[key], value), key
    assert str(found.metrics) == str(plain.metrics)  # as text, so that NaN equals NaN
    assert found.texts == plain.texts
    assert found.logs == plain.logs
    assert torch.equal(found.random, plain.random)


def test_the_observer_has_every_hook() -> None:
    missing = [hook for hook in HOOKS if not hasattr(getattr(Observer, hook, None), "trl_ext_impl")]
    assert missing == ["trainer_arguments", "hidden_positions", "policy_loss", "run"]


def test_the_comparison_notices_a_small_change(build: Callable[..., Any], plugin: Callable[[type], str]) -> None:
    class Nudge(Plugin):
        name = "nudge"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            return round.advantages * 1.001

    plain = outcome(build, "grpo")
    with trl_ext.enable(plugin(Nudge)):
        found = outcome(build, "grpo")
    assert not all(torch.equal(found.parameters[key], value) for key, value in plain.parameters.items())
    assert found.logs["advantages"] != plain.logs["advantages"]


@pytest.mark.parametrize("way", ["attach", "extend"])
def test_the_other_ways_in_are_as_idle(way: str, build: Callable[..., Any], plugin: Callable[[type], str]) -> None:
    from trl import GRPOTrainer

    reference = plugin(Observer)

    def made(kind: str, **settings: Any) -> Any:
        if way == "attach":
            return trl_ext.attach(build(kind, **settings), reference)
        return build(kind, cls=trl_ext.extend(GRPOTrainer, reference), **settings)

    plain, found = outcome(build, "grpo"), outcome(made, "grpo")
    for key, value in plain.parameters.items():
        assert torch.equal(found.parameters[key], value), key
    assert str(found.metrics) == str(plain.metrics)


@pytest.mark.parametrize("name", ["grpo", "rloo", pytest.param("dpo", marks=NEEDS_FUSED)])
def test_hooks_were_called(name: str, build: Callable[..., Any], plugin: Callable[[type], str]) -> None:
    """The parity above would also hold if nothing ran."""
    with trl_ext.enable(plugin(Observer)) as handle:
        trainer = build(name)
        trainer.train()
        assert handle.trainers == [trainer]
        calls = trainer._trl_ext.calls
    stages = set(SERVED[RUNS[name][0]]) - set(NO_STAGE) - {"policy_loss", "hidden_positions", "run"}
    assert {hook for _, hook in calls} >= stages | {"setup"}
