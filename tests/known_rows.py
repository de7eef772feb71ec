"""Runs on completions that a test knows, and how two runs compare."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, hookimpl


class Known(Plugin):
    """Completions that depend on the prompt and on the place in the group, and nothing else."""

    name = "known"
    trainers = ("grpo", "rloo")

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result = generate(prompts)
        ids = []
        for row, prompt in enumerate(prompts):
            which = int(prompt[-1]["content"].partition("+")[0])
            ids.append([10 + (13 * which + 7 * (row % 4) + i * i) % 80 for i in range(2 + (which + 3 * row) % 6)])
        texts = [[{"role": "assistant", "content": trainer.processing_class.decode(row)}] for row in ids]
        mask = None if result.tool_mask is None else [[1] * (len(row) - 1) + [0] for row in ids]
        return dataclasses.replace(result, completion_ids=ids, completions=texts, tool_mask=mask)


def spread(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) / 3 for ids in completion_ids]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def train_known(
    train: Any,
    plugin: Any,
    plugins: list[Any],
    prompts: tuple[int, ...] = (0, 1, 2),
    kind: str = "grpo",
    outer: list[Any] | None = None,
    **settings: Any,
) -> Any:
    """Trains on prompts 0, 1, 2 in micro-batches of one group each, or on a part of them, without shuffling.

    Args:
        train: The fixture that trains.
        plugin: The fixture that publishes plugins.
        plugins: Classes of plugins, and names of built-in ones.
        prompts: The prompts.
        kind: The trainer.
        outer: Classes of plugins whose `rollout` surrounds the known completions.
        settings: Training arguments that differ.
    """
    common = {"rewards": [spread], "data": tiny_data().select(prompts), "shuffle_dataset": False, "optim": "sgd"}
    common |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": len(prompts), "max_steps": 2}
    others = [cls if isinstance(cls, (str, dict)) else plugin(cls) for cls in plugins]
    with trl_ext.enable(*map(plugin, outer or ()), plugin(Known), *others):
        trainer = train(kind, **common | {"learning_rate": 0.2, "max_grad_norm": 1e9} | settings)
        trainer.used = trainer._trl_ext.plugins
    return trainer


def assert_same_training(one: Any, other: Any, tolerance: float = 2e-6) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(value, others[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def moved(one: Any, other: Any) -> float:
    others = dict(other.model.named_parameters())
    return max((value - others[name]).abs().max().item() for name, value in one.model.named_parameters())
