"""HDPO in training: the gradient of every token against the loss written down, denominators, resumes, real tools."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import Scripted, calls, digits, tiny_data, tiny_trainer
from trl_ext.tools import calculator
from trl_ext_hooks import Logps, Plugin, hookimpl
from trl_ext_plugins.hdpo import (
    tool_advantages,
)

Run = Callable[..., tuple[Any, list[Any]]]


LEFT: list[Any] = []
"""The micro-batches of each instance of `Leaves`, which ends with its trainer."""


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same_weights(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def moved(trainer: Any, build: Any) -> float:
    fresh = dict(build().model.named_parameters())
    return max((value - fresh[name]).abs().max().item() for name, value in trainer.model.named_parameters())


class Leaves(Plugin):
    """Cuts the graph at the log-probabilities, off the sampling policy, so that their gradients can be read."""

    name = "leaves"
    trainers = ("grpo",)

    def start(self) -> None:
        self.leaf: torch.Tensor | None = None
        self.batches: list[tuple[torch.Tensor, dict[str, Any]]] = []
        LEFT.append(self.batches)

    @hookimpl
    def logps(self, call: Any, compute: Any) -> Logps:
        result = compute()
        if call.role != "policy":
            return result
        completions = call.input_ids[:, -call.logits_to_keep :]
        drift = 0.7 * torch.sin(completions.float()) * (result.per_token_logps != 0)
        self.leaf = (result.per_token_logps + drift).detach().requires_grad_()
        return dataclasses.replace(result, per_token_logps=self.leaf)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        assert self.leaf is not None
        self.batches.append((self.leaf, dict(loss.batch)))


def expected_gradients(
    batches: list[tuple[torch.Tensor, dict[str, Any]]], args: Any, w_tool: float
) -> list[torch.Tensor]:
    """Gradients of w_acc L_acc + w_tool L_tool over one optimizer step, written down without the plugin's code."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf, _ in batches]

    def pieces(index: int, key: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token losses (m, T), their mask, and which rows take part."""
        batch, logps = batches[index][1], leaves[index]
        mask = (batch["completion_mask"] * batch["tool_mask"]).float()
        difference = logps - batch["old_per_token_logps"]
        if args.importance_sampling_level == "sequence":
            difference = ((difference * mask).sum(1) / mask.sum(1).clamp(min=1)).unsqueeze(1).expand_as(mask)
        advantage = batch[key].unsqueeze(1)
        ratio, loss = difference.exp(), None
        clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon_high)
        loss = torch.max(-ratio * advantage, -clipped * advantage)
        if args.delta is not None:
            loss = torch.where(advantage < 0, torch.min(loss, -args.delta * advantage), loss)
        rows = (batch[key] != 0) if key != "advantages" else batch.get("trl_ext_kept", torch.ones(len(mask)).bool())
        return loss, mask * rows.unsqueeze(1), rows

    def channel(key: str) -> torch.Tensor:
        parts = [pieces(index, key) for index in range(len(batches))]
        if args.loss_type == "bnpo":
            return sum((loss * mask).sum() / mask.sum().clamp(min=1) for loss, mask, _ in parts) / len(parts)  # type: ignore
        total = sum((loss * mask).sum() for loss, mask, _ in parts)
        count = sum(int(rows.sum()) for _, _, rows in parts)
        if args.loss_type == "dapo":
            return total / sum(mask.sum() for _, mask, _ in parts)
        if args.loss_type == "grpo":
            means = [(loss * mask).sum(1) / mask.sum(1).clamp(min=1) for loss, mask, _ in parts]
            return sum(mean.sum() for mean in means) / count
        if args.loss_type == "dr_grpo":
            return total / (count * args.max_completion_length)
        return total / count  # luspo

    (channel("advantages") + w_tool * channel("hdpo_tool_advantages")).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


LOSSES = [(kind, "token", None) for kind in ("dapo", "bnpo", "grpo", "dr_grpo", "luspo")]
LOSSES += [("dapo", "token", 3.0), ("dapo", "sequence", None), ("grpo", "sequence", 3.0), ("luspo", "sequence", None)]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(("loss_type", "level", "delta"), LOSSES)
def test_gradients_of_every_token(
    loss_type: str, level: str, delta: float | None, accumulation: int, scripted: Run, plugin: Any, mixed: Any
) -> None:
    """Rounds are used twice, so ratios leave 1 and the clips act."""
    trainer, _ = scripted(
        mixed,
        options={"w_tool": 0.3},
        also=[plugin(Leaves)],
        loss_type=loss_type,
        importance_sampling_level=level,
        delta=delta,
        epsilon_high=0.28,
        num_iterations=2,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    batches = LEFT.pop()
    assert len(batches) == accumulation
    if accumulation > 1:  # a micro-batch without any signal is among the cases
        assert {bool((batch["hdpo_tool_advantages"] != 0).any()) for _, batch in batches} >= {True}
    expected = expected_gradients(batches, trainer.args, 0.3)
    ratios = [(leaf - batch["old_per_token_logps"]).exp() for leaf, batch in batches]
    assert max(ratio.max() for ratio in ratios) > 1.5 and min(ratio.min() for ratio in ratios) < 0.7
    for (leaf, batch), wanted in zip(batches, expected, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-4)
        # tokens that a tool wrote, and padding, have none
        assert (leaf.grad[(batch["completion_mask"] * batch["tool_mask"]) == 0] == 0).all()


class Drop(Plugin):
    """Leaves out a right rollout with a signal, a wrong one, and another one of the second prompt."""

    name = "drop"
    trainers = ("grpo",)

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return torch.tensor([True, False, True, False, True, True, True, False])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_rows_that_another_plugin_leaves_out(loss_type: str, scripted: Run, plugin: Any, mixed: Any) -> None:
    """They are in no denominator of either channel; the statistics were made with them."""
    settings = {"loss_type": loss_type, "num_iterations": 2, "epsilon_high": 0.2}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer, (round,) = scripted(mixed, options={"w_tool": 0.3}, also=[plugin(Drop), plugin(Leaves)], **settings)
    batches = LEFT.pop()
    for (leaf, _), wanted in zip(batches, expected_gradients(batches, trainer.args, 0.3), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, wanted, atol=1e-6, rtol=1e-4)
    assert round.kept.tolist() == Drop().keep_rows(round=None).tolist()
    _, (whole,) = scripted(mixed, **settings)
    kept = whole.batch["hdpo_tool_advantages"] * round.kept
    assert torch.equal(round.batch["hdpo_tool_advantages"], kept) and (kept != 0).sum() == 4
    if loss_type != "dapo":
        assert round.batch["hdpo_tool_share"].item() == pytest.approx(4 / 5)


def test_without_the_tool_loss_it_is_grpo_on_the_weighted_rewards(
    scripted: Run, build: Any, mixed: Any, all_right: Any, common: Any
) -> None:
    settings = {"loss_type": "dapo", "num_iterations": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05}
    settings |= {"per_device_train_batch_size": 4, "optim": "sgd"}
    ours, _ = scripted(mixed, all_right, options={"w_tool": 0.0, "eps": 1e-4}, **settings)
    same = common | settings | {"data": tiny_data(rows=2), "max_steps": 2, "reward_weights": [0.9, 0.1]}
    stock = build(trainer={"rollout_func": Scripted(mixed, all_right)}, **same)
    stock.train()
    for key in ("loss", "grad_norm", "reward", "reward_std", "entropy", "clip_ratio/region_mean"):
        assert logged(ours, key) == pytest.approx(logged(stock, key), abs=1e-6), key
    same_weights(stock, ours, 1e-6)
    assert logged(ours, "hdpo/tool") == [0.0, 0.0]
    with_tool, _ = scripted(mixed, all_right, options={"eps": 1e-4}, **settings)
    assert logged(with_tool, "grad_norm")[0] != pytest.approx(logged(stock, "grad_norm")[0], rel=1e-3)


def test_where_all_are_right_only_economy_is_learnt(scripted: Run, build: Any, all_right: Any) -> None:
    silent, (round,) = scripted(all_right, options={"w_tool": 0.0})
    assert (round.advantages == 0).all() and logged(silent, "grad_norm") == [0.0]
    trainer, (round,) = scripted(all_right)
    assert (round.batch["hdpo_tool_advantages"][4:] == 0).all() and (round.advantages == 0).all()
    assert logged(trainer, "grad_norm")[0] > 0 and moved(trainer, build) > 1e-4
    double, _ = scripted(all_right, options={"w_tool": 0.3})
    assert logged(double, "grad_norm")[0] == pytest.approx(2 * logged(trainer, "grad_norm")[0], rel=1e-4)


def test_the_leanest_right_rollout_is_pulled_up(scripted: Run, plugin: Any, mixed: Any) -> None:
    found = []
    for w_tool in (0.0, 0.15):
        scripted(mixed, options={"w_tool": w_tool}, also=[plugin(Leaves)], num_iterations=1)
        ((leaf, batch),) = LEFT.pop()
        lean = batch["hdpo_tool_advantages"].argmax()
        wasteful = batch["hdpo_tool_advantages"].argmin()
        assert leaf.grad is not None
        mask = batch["completion_mask"] * batch["tool_mask"]
        found.append([(leaf.grad[row] * mask[row]).sum().item() for row in (lean, wasteful)])
    assert found[1][0] < found[0][0] < 0 and found[1][1] > found[0][1]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo", "luspo"])
def test_a_batch_twice_has_the_loss_of_the_batch(loss_type: str, scripted: Run, mixed: Any) -> None:
    once, _ = scripted(mixed, loss_type=loss_type)
    twice, _ = scripted(mixed + mixed, loss_type=loss_type, per_device_train_batch_size=16, data=tiny_data(rows=4))
    for key in ("hdpo/tool", "loss", "grad_norm"):
        assert logged(twice, key) == pytest.approx(logged(once, key), rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "luspo"])
def test_it_trains_alike_for_1x8_and_8x1(loss_type: str, scripted: Run, build: Any, mixed: Any, all_right: Any) -> None:
    common = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.05}
    whole, _ = scripted(mixed, all_right, **common)
    single = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    split, _ = scripted(mixed, all_right, **single, **common)
    same_weights(whole, split, 2e-6)
    assert logged(split, "hdpo/tool") == pytest.approx(logged(whole, "hdpo/tool"), rel=1e-3, abs=1e-6)
    assert moved(whole, build) > 1e-4


def test_rounds_that_span_several_optimizer_steps(scripted: Run, mixed: Any) -> None:
    """steps_per_generation above the accumulation: the count of a round is rescaled to one step, as TRL does."""
    trainer, rounds = scripted(
        mixed, mixed, loss_type="dapo", per_device_train_batch_size=2, steps_per_generation=4, learning_rate=0.0
    )
    assert len(rounds) == 1  # two of its four steps
    halves = logged(trainer, "hdpo/tool")
    trainer, _ = scripted(
        *[mixed] * 4, loss_type="dapo", per_device_train_batch_size=2, steps_per_generation=4, learning_rate=0.0
    )
    parts = logged(trainer, "hdpo/tool")
    assert parts[:2] == halves
    whole, _ = scripted(mixed, loss_type="dapo")
    assert sum(parts) / 4 == pytest.approx(logged(whole, "hdpo/tool")[0], abs=1e-6)


def test_the_denominator_of_the_readme(scripted: Run, mixed: Any) -> None:
    signal, (round,) = scripted(mixed)
    everybody, _ = scripted(mixed, options={"tool_loss_denominator": "all"})
    share = round.batch["hdpo_tool_share"].item()
    assert 0.5 < share < 1
    assert logged(everybody, "hdpo/tool")[0] == pytest.approx(share * logged(signal, "hdpo/tool")[0], rel=1e-4)


def test_empty_completions_contribute_nothing(scripted: Run, plugin: Any, mixed: Any, rollout: Any) -> None:
    rows = [*mixed[:5], rollout(4, 1.0, 1.0, 1, masked=0), *mixed[6:]]
    rows[5]["env_mask"] = [0]  # right, and not a token of its own
    _, (round,) = scripted(rows, also=[plugin(Leaves)], num_iterations=2)
    assert round.batch["hdpo_tool_advantages"][5] != 0
    assert round.batch["hdpo_tool_share"].item() == pytest.approx(13 / 20)
    batches = LEFT.pop()
    for leaf, batch in batches:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
        empty = (batch["completion_mask"] * batch["tool_mask"]).sum(1) == 0
        assert (leaf.grad[empty] == 0).all()


def test_it_resumes_exactly(build: Any, tmp_path: Path, mixed: Any, all_right: Any, counted: Any, common: Any) -> None:
    def run(script: Scripted, resume: str | None = None) -> Any:
        with trl_ext.enable(hdpo=counted):
            saved = common | {"data": tiny_data(rows=2), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
            trainer = build(trainer={"rollout_func": script}, output=tmp_path / "run", **saved)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(Scripted(mixed, all_right))
    resumed = run(Scripted(all_right), str(tmp_path / "run" / "checkpoint-1"))
    same_weights(whole, resumed, 0.0)


def test_adapters_learn_the_tool_loss_too(scripted: Run, all_right: Any) -> None:
    from peft import LoraConfig

    extra = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    trainer, _ = scripted(all_right, trainer=extra)
    learnt = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert learnt and all(value.abs().max() > 0 for value in learnt)  # they start at 0, and accuracy is silent


def answered(completions: list[Any], **kwargs: Any) -> list[float]:
    """Whether a rollout ends with an answer rather than with a call that nobody executed."""
    return [float(not completion[-1].get("tool_calls")) for completion in completions]


@pytest.mark.parametrize(
    "also", [[], pytest.param(["shared-prefix"], marks=pytest.mark.slow)], ids=["dense", "shared-prefix"]
)
def test_real_tools_in_trls_own_loop(also: list[str], tool_model: str, tmp_path: Path, look: str) -> None:
    settings: dict[str, Any] = {"max_completion_length": 200, "max_tool_calling_iterations": 2, "max_steps": 3}
    settings["generation_kwargs"] = calls(tool_model, "calculator", likelihood=4.0, expression="6 * 7")
    settings |= {"data": tiny_data(rows=2), "learning_rate": 1e-3, "beta": 0.01, "delta": 3.0}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}
    with trl_ext.enable("hdpo", look, *also):
        trainer = tiny_trainer(
            "grpo",
            tool_model,
            tmp_path / "run",
            rewards=[answered, digits],
            trainer={"tools": [calculator]},
            **settings,
        )
        before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
        trainer.train()
        rounds = trainer._trl_ext.plugins["look"].rounds
    signals = 0
    for round in rounds:
        correct = torch.tensor(answered(round.completions)).bool()
        counted = torch.tensor(
            [sum(message["role"] == "tool" for message in completion) for completion in round.completions]
        )
        expected = tool_advantages(counted, correct, round.group_ids)
        torch.testing.assert_close(round.batch["hdpo_tool_advantages"].double(), expected, atol=1e-6, rtol=0)
        tokens = (round.loss_mask.sum(1) * (expected != 0)).sum() / round.loss_mask.sum()
        torch.testing.assert_close(round.batch["hdpo_tool_share"], tokens.float())
        assert ((round.batch["tool_mask"] == 0).any(1) == (counted > 0)).all()
        signals += int((expected != 0).sum())
    assert signals > 0 and len(rounds) == 2
    assert any((value - before[name]).abs().max() > 1e-5 for name, value in trainer.model.named_parameters())
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
