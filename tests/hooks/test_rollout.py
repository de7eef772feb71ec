"""Rollouts: which tokens the model wrote, and the columns of the data as reward functions get them."""

from __future__ import annotations

import types
from typing import Any

import torch

import trl_ext
from trl_ext_hooks import Plugin, Rollout, hookimpl


def made(ids: list[list[int]], tool_mask: list[list[int]] | None) -> Rollout:
    rows = len(ids)
    trainer: Any = types.SimpleNamespace()
    return Rollout(
        mode="train",
        step=0,
        num_generations=1,
        rows=[{}] * rows,
        prompts=[""] * rows,
        completions=[""] * rows,
        completion_ids=ids,
        tool_mask=tool_mask,
        group_ids=torch.arange(rows),
        offset=0,
        trainer=trainer,
    )


def test_tokens_that_the_model_wrote() -> None:
    """All of them without tools; the lists differ in length."""
    ids = [[7, 8, 9], [], [5]]
    assert made(ids, None).written == [[1, 1, 1], [], [1]]
    mask = [[1, 0, 1], [], [0]]
    assert made(ids, mask).written == mask


def test_columns_are_the_keyword_arguments_of_reward_functions(train: Any, plugin: Any) -> None:
    """Also those of a `rollout_func` and of `annotate`, so that one callable serves as reward and as label."""
    seen: dict[str, Any] = {}

    def label(prompts: list[Any], completions: list[Any], completion_ids: list[Any], **columns: Any) -> list[float]:
        seen["reward"] = {name: values for name, values in columns.items() if isinstance(values, list)}
        return [1.0] * len(completions)

    class Labels(Plugin):
        name = "labels"
        trainers = ("grpo",)
        fields = ("doubled",)

        @hookimpl
        def annotate(self, rollout: Any) -> dict[str, Any]:
            seen["rollout"] = rollout.columns
            return {"doubled": 2 * torch.tensor(rollout.columns["index"])}

        @hookimpl
        def rewards(self, scored: Any) -> None:
            seen["scored"] = scored.columns

    with trl_ext.enable(plugin(Labels)):
        train(rewards=[label], max_steps=1)
    assert seen["scored"] == seen["reward"] and set(seen["reward"]) == {"answer", "index", "doubled"}
    assert seen["rollout"] == {name: seen["reward"][name] for name in ("answer", "index")}
    assert made([], None).columns == {}
