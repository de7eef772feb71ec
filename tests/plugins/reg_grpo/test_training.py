"""Reg-GRPO: real runs against plain GRPO and RLOO, split rounds, and rewards that do not apply."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import digits
from trl_ext_hooks import Plugin, hookimpl

SGD = {"optim": "sgd", "learning_rate": 0.05, "beta": 0.0, "max_steps": 2}


def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 7) / 3 for ids in completion_ids]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def distance(one: Any, other: Any) -> float:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max((left - right).abs().max().item() for left, right in pairs)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_one_update_per_rollout_is_a_policy_gradient(kind: str, train: Any, build: Any) -> None:
    """The gradient is 2 / (floor + eps) times that of GRPO without division by lengths, or that of RLOO."""
    length = 8
    common = SGD | {"max_completion_length": length, "max_grad_norm": 0.0, "per_device_train_batch_size": 8}
    stock = train(kind, **common | ({"loss_type": "dr_grpo"} if kind == "grpo" else {}))
    factor = length if kind == "grpo" else 1
    with trl_ext.enable("reg-grpo", **{"reg-grpo": {"std_floor": 2.0 * factor - 1e-4}}):
        ours = train(kind, **common)
    assert distance(stock, ours) < 1e-6 and distance(stock, build(kind, **common)) > 1e-4
    assert logged(ours, "reg-grpo/floored") == [1.0, 1.0]


def test_the_log_ratios_learn_the_advantages_however_a_round_is_split(train: Any, plugin: Any) -> None:
    """Four updates of one rollout: the error falls, and the groups of a round weigh alike in every micro-batch."""

    class Leaves(Plugin):
        """Leaves a row out."""

        name = "leaves"
        trainers = ("grpo",)

        @hookimpl
        def keep_rows(self, round: Any) -> torch.Tensor:
            return torch.arange(len(round.rewards)) != 5

    common = SGD | {"rewards": [digits, sometimes], "num_iterations": 4, "max_steps": 4, "learning_rate": 0.3}
    with trl_ext.enable("reg-grpo", plugin(Leaves)):
        whole = train(per_device_train_batch_size=16, **common)
        split = train(per_device_train_batch_size=4, gradient_accumulation_steps=4, **common)
    errors = logged(whole, "reg-grpo/error")
    assert errors[-1] < 0.5 * errors[0] and logged(whole, "reg-grpo/log_ratio_std")[-1] > 0.01
    assert distance(whole, split) < 5e-6
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert logged(split, "reg-grpo/error") == pytest.approx(errors, abs=1e-5)
