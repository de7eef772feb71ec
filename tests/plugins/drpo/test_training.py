"""DRPO and DisCO in real runs: plain GRPO as their limit, and what must not change a run."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, hookimpl


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    for (name, value), second in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(second, value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def distance(one: Any, other: Any) -> float:
    return max(
        (a - b).abs().max().item() for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def half(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(row % 2) for row in range(len(completion_ids))]


def mixed(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 3 == 0) for ids in completion_ids]


def test_with_half_of_a_group_right_the_limit_is_grpo(train: Any) -> None:
    """Rewards of 0 and 4 have the advantages -2 and 2, which are G / 2 for each half."""
    common = {"rewards": [half], "optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "max_grad_norm": 1e9}
    common |= {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    grpo = train(scale_rewards="none", loss_type="grpo", reward_weights=[4.0], **common)
    with trl_ext.enable("disco", disco={"negatives": "mean"}):
        disco = train(**common)
    with trl_ext.enable("disco", disco={"negatives": "mean", "score": "Lratio"}):
        ratios = train(**common)
    with trl_ext.enable("drpo", drpo={"tau": 1e7, "length_temperature": 1e9}):
        drpo = train(**common)
    with trl_ext.enable("drpo", drpo={"tau": 0.01}):
        far = train(**common)
    assert logged(grpo, "grad_norm")[0] > 0.1 and distance(grpo, far) > 1e-3
    for ours in (disco, ratios, drpo):
        assert list(ours._logs["completion"]) == list(grpo._logs["completion"])
        assert_close_training(grpo, ours, 1e-6)
        (kl,) = [key for key in ours.state.log_history[0] if key.endswith("/kl")]
        assert set(logged(ours, kl)) == {0.0}


class Groups(Plugin):
    """Which groups the steps and the micro-batches hold."""

    name = "groups"
    trainers = ("grpo",)

    def start(self) -> None:
        self.seen: list[list[list[int]]] = []

    @hookimpl
    def step_statistics(self, step: Any) -> None:
        self.seen.append([loss.group_ids.tolist() for loss in step.micro_batches])


@pytest.mark.parametrize(("name", "iterations", "slices"), [("drpo", 2, 1), ("disco", 1, 2)])
def test_micro_batches_that_split_groups_train_alike(
    name: str, iterations: int, slices: int, train: Any, plugin: Any
) -> None:
    """Also where a round has several steps, each of which takes whole groups."""
    common = {"rewards": [mixed], "optim": "sgd", "learning_rate": 0.3, "max_steps": 4, "max_grad_norm": 1e9}
    common |= {"num_iterations": iterations}
    with trl_ext.enable(plugin(Groups), name, **{name: {"kl_penalty": 20.0, "tau": 0.5}}):
        runs = []
        for rows, parts in ((8, 1), (2, 4)):
            sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
            runs.append(train(steps_per_generation=parts * slices, **common | sizes))
            steps = runs[-1]._trl_ext.plugins["groups"].seen
            counts = [Counter(itertools.chain(*groups)) for groups in steps]
            assert len(steps) == 4 and all(set(count.values()) == {4} and len(count) == 2 for count in counts)
    whole, split = runs
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert_close_training(whole, split, 2e-5)
    assert {0.0, 1.0} <= set(logged(whole, f"{name}/constraint_active")) and logged(whole, f"{name}/kl")[0] == 0
    of_steps = (logged(split, key) for key in ("loss", f"{name}/objective", f"{name}/kl"))
    for loss, objective, kl in zip(*of_steps, strict=True):
        assert loss == pytest.approx(20 * max(kl - 1e-4, 0) * kl - objective, abs=1e-5)


def test_a_larger_penalty_keeps_the_policy_closer(train: Any) -> None:
    found = []
    for penalty in (0.0, 200.0, 2000.0):
        with trl_ext.enable("disco", disco={"kl_penalty": penalty, "kl_estimate": "low_var_kl"}):
            trainer = train(rewards=[mixed], num_iterations=8, max_steps=8, learning_rate=3e-3)
        found.append(logged(trainer, "disco/kl")[-1])
    assert found[0] > 1.2 * found[1] > 1.2 * 1.2 * found[2] > 0


@pytest.mark.parametrize("name", ["drpo", "disco"])
def test_rloo_and_resume(name: str, build: Any) -> None:
    settings = {"rewards": [mixed], "beta": 0.0, "num_iterations": 2, "max_steps": 4}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    with trl_ext.enable(name):
        whole = build("rloo", **settings)
        whole.train()
        resumed = build("rloo", **settings)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert distance(whole, resumed) == 0 and logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]
    kl = logged(whole, f"{name}/kl")
    assert abs(kl[0]) < 1e-6 < abs(kl[1]) and len(set(logged(whole, "loss"))) == 4


def test_a_round_without_contrast_learns_nothing_and_evaluation_has_whole_groups(build: Any) -> None:
    def wrong(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [0.0] * len(completion_ids)

    with trl_ext.enable("drpo"):
        data = {"eval_dataset": tiny_data().select([0, 1])}
        trainer = build(trainer=data, rewards=[wrong], max_steps=1, per_device_eval_batch_size=8)
        before = [value.detach().clone() for value in trainer.model.parameters()]
        trainer.train()
        trainer.evaluate()
    after = trainer.model.parameters()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert logged(trainer, "grad_norm") == [0.0] and logged(trainer, "drpo/mixed_prompts") == [0.0]
    assert logged(trainer, "eval_drpo/mixed_prompts") == [0.0] and math.isfinite(logged(trainer, "eval_loss")[0])
