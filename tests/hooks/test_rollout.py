"""Rollouts: which tokens the model wrote, and rows of several generations in one."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from trl_ext_hooks import Generation, Rollout


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
