"""Rollouts: which tokens the model wrote, rows of several generations in one, and columns as rewards get them."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext_hooks import Generation, Plugin, Rollout, hookimpl


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


def generation(name: str, rows: int, **changes: Any) -> Generation:
    texts = [f"{name}{i}" for i in range(rows)]
    ids = [[ord(name), i] for i in range(rows)]
    extra = {"images": None, "extra_fields": {"score": list(range(rows)), "run": 7}}
    return Generation(ids, ids, texts, **{"extra": extra} | changes)


def test_rows_of_a_generation() -> None:
    picked = generation("a", 3).select([2, 0, 2])
    assert picked.completions == ["a2", "a0", "a2"] and picked.prompt_ids[1] == [ord("a"), 0]
    assert picked.extra == {"images": None, "extra_fields": {"score": [2, 0, 2], "run": 7}}
    assert generation("a", 3).select([]).completions == []


def test_rows_of_another_generation_in_their_places() -> None:
    images = {"images": ["p", "q"], "extra_fields": {"score": [8, 9], "run": 7}}
    own, other = generation("a", 4), generation("b", 2, tool_mask=[[1, 0], [0, 1]], extra=images)
    mixed = own.replaced([3, 1], other)
    assert mixed.completions == ["a0", "b1", "a2", "b0"]
    assert mixed.tool_mask == [[1, 1], [0, 1], [1, 1], [1, 0]]
    assert mixed.extra == {"images": [None, "q", None, "p"], "extra_fields": {"score": [0, 9, 2, 8], "run": 7}}
    assert own.replaced([], Generation([], [], [])) is own and own.completions[1] == "a1"
    for rows, by in (([0], other), ([0, 0], other), ([0, 4], other), ([-1, 0], other)):
        with pytest.raises(ValueError, match="expected as many rows, each of them once, of the 4 that there are"):
            own.replaced(rows, by)
    with pytest.raises(ValueError, match="two generations of which one has `logprobs`"):
        own.replaced([0, 1], generation("b", 2, logprobs=[[0.1], [0.2]]))


def test_rows_of_another_generation_behind_its_own() -> None:
    own = generation("a", 2, source=[0, 1], fields={"who": ["x", "y"]})
    other = generation("b", 1, tool_mask=[[1, 0]], source=[1], fields={"who": ["z"]})
    both = own.joined(other)
    assert both.completions == ["a0", "a1", "b0"] and both.tool_mask == [[1, 1], [1, 1], [1, 0]]
    assert both.source == [0, 1, 1] and both.fields == {"who": ["x", "y", "z"]}
    assert own.joined(Generation([], [], [])) is own and Generation([], [], []).joined(own) is own
    with pytest.raises(ValueError, match="two generations of which one has `logprobs` cannot become one"):
        own.joined(generation("b", 1, logprobs=[[0.1]]))
