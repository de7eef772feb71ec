"""Rollouts: which tokens the model wrote."""

from __future__ import annotations

import types
from typing import Any

import torch

from trl_ext_hooks import Rollout


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
