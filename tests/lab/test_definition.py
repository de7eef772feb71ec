"""Definitions of tasks, sizes and warm-ups that cannot work."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from trl_ext import ConfigError, lab


def reward(completions: list[Any], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "My Task"}, r"lower-case words joined by hyphens, such as 'my-task'; got 'My Task'"),
        ({"trainers": ("ppo",)}, r"task 'modes': `trainers` must be a tuple with some of grpo, rloo, dpo"),
        ({"trainers": ()}, r"`trainers` must be"),
        ({"rewards": ()}, r"`rewards` is empty"),
        ({"rewards": (reward, reward)}, r"a name of its own; got \['reward', 'reward'\]"),
        ({"rewards": (lambda **columns: [],)}, r"a name of its own"),
        ({"tools": (reward,)}, r"tools and environments work with GRPO only; `trainers` is \('grpo', 'rloo'\)"),
    ],
)
def test_definitions_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(lab.task("modes"), **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lab.Shape(width=30, heads=4), r"Shape: `width` \(30\) must be a multiple of twice `heads` \(4\)"),
        (lambda: lab.Shape(layers=0), r"Shape: `layers` must be 1 or more; got 0"),
        (
            lambda: lab.Shape(architecture="qwen"),
            r"Shape: `architecture` is 'qwen'\. Did you mean 'qwen3' or 'qwen2-vl'\?",
        ),
        (lambda: lab.WarmUp(batch_size=0), r"WarmUp: `batch_size` must be 1 or more; got 0"),
        (lambda: lab.WarmUp(steps=-1), r"WarmUp: `steps` \(-1\) must not be negative"),
        (lambda: lab.WarmUp(learning_rate=0), r"`learning_rate` \(0\) must be positive"),
    ],
)
def test_sizes_that_cannot_work(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_task_for_dpo_alone_needs_no_reward() -> None:
    assert dataclasses.replace(lab.task("letters"), trainers=("dpo",), rewards=()).rewards == ()
