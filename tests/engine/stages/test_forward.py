"""The forward in real trainers: roles, and the numbers of the plugin that owns it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext.trl_internals import seams
from trl_ext_hooks import Logps, Plugin, hookimpl

ROUNDS = ("grpo", "rloo")
FUSED = seams.trl_version() >= seams.Version("1.15")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def lora(**settings: Any) -> dict[str, Any]:
    from peft import LoraConfig

    return {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings)}


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


class Roles(Plugin):
    name = "roles"
    trainers = ("grpo", "rloo", "dpo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.calls: list[tuple[str, bool]] = []

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Logps:
        result = compute()
        self.calls.append((call.role, result.per_token_logps.requires_grad))
        self.last = call
        return result


STALE = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 2}
ROLE_RUNS: list[Any] = [
    pytest.param("grpo", {"max_steps": 2}, ["policy"] * 2, id="grpo"),
    pytest.param("grpo", {"max_steps": 2, "beta": 0.1}, ["reference", "policy"] * 2, id="grpo-kl"),
    pytest.param("grpo", {**STALE, "beta": 0.1}, ["old", "reference"] + ["policy"] * 4, id="grpo-reuse"),
    pytest.param("grpo", {"max_steps": 1, "beta": 0.1, "trainer": "lora"}, ["reference", "policy"], id="grpo-lora"),
    pytest.param("rloo", {"max_steps": 1, "beta": 0.0}, ["old", "policy"], id="rloo"),
    pytest.param("rloo", {"max_steps": 1}, ["old", "reference", "policy"], id="rloo-kl"),
    pytest.param("rloo", {"max_steps": 1, "trainer": "lora"}, ["old", "reference", "policy"], id="rloo-lora"),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), ROLE_RUNS)
def test_the_owner_is_told_the_role_of_every_forward(
    kind: str, settings: dict[str, Any], expected: list[str], build: Any, plugin: Any
) -> None:
    if settings.get("trainer") == "lora":
        settings = {**settings, "trainer": lora()}
    with trl_ext.enable(plugin(Roles)):
        trainer = build(kind, **settings)
        trainer.train()
        calls = own(trainer, "roles").calls
    assert [role for role, _ in calls] == expected
    assert all(gradient == (role == "policy") for role, gradient in calls)


@pytest.mark.skipif(not FUSED, reason="needs the fused head of TRL 1.15")
@pytest.mark.parametrize("setup", ["full", "lora"])
def test_roles_of_pairs_in_training_and_evaluation(setup: str, build: Any, plugin: Any) -> None:
    extra = {"eval_dataset": tiny_data("dpo", 4)} | (lora() if setup == "lora" else {})
    with trl_ext.enable(plugin(Roles)):
        trainer = build("dpo", trainer=extra, max_steps=1)
        trainer.train()
        mine = own(trainer, "roles")
        assert sorted(mine.calls) == [("policy", True), ("reference", False)]
        assert mine.last.kind == "dpo" and mine.last.logits_to_keep == mine.last.input_ids.shape[1] - 1
        mine.calls.clear()
        trainer.evaluate()
        assert sorted(mine.calls) == [("policy", False), ("reference", False)]


@pytest.mark.skipif(not FUSED, reason="needs the fused head of TRL 1.15")
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_pairs_use_the_owners_numbers(factor: float, build: Any, plugin: Any) -> None:
    """Log-probabilities twice as large are a beta twice as large."""

    class Scale(Plugin):
        name = "scale"
        trainers = ("dpo",)

        @hookimpl
        def logps(self, call: Any, compute: Any) -> Logps:
            result = compute()
            return Logps(factor * result.per_token_logps, result.entropies, result.aux_loss, result.extra)

    plain = build("dpo", beta=0.1 * factor)
    plain.train()
    with trl_ext.enable(plugin(Scale)):
        trainer = build("dpo", beta=0.1)
        trainer.train()
    assert_close_training(plain, trainer, 0.0 if factor == 1.0 else 1e-6)
    assert "forward" not in vars(trainer.model) or trainer.model.forward.__qualname__.count("pair_forwards") == 0


class Sharpen(Plugin):
    """An owner whose numbers differ from TRL's; they must be the ones that train."""

    name = "sharpen"
    trainers = ROUNDS

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Logps:
        result = compute()
        return Logps(0.5 * result.per_token_logps, result.entropies, result.aux_loss)


def test_rounds_use_the_owners_numbers(build: Any, plugin: Any) -> None:
    plain = build(max_steps=1, loss_type="grpo", max_grad_norm=1e9)
    plain.train()
    with trl_ext.enable(plugin(Sharpen)):
        trainer = build(max_steps=1, loss_type="grpo", max_grad_norm=1e9)
        trainer.train()
    assert logged(trainer, "grad_norm")[0] == pytest.approx(0.5 * logged(plain, "grad_norm")[0], rel=1e-4)
