"""Messages and texts of completions: how many tool calls they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def count_tool_messages(completions: Sequence[Any]) -> torch.Tensor:
    """Counts the executed tool calls of each completion: its messages with the role `tool`.

    A failed call is answered by a message too and counts. A call that the model wrote and nobody executed (turn limit,
    or a result that would not have fitted) has no message and does not count. Parallel calls in one turn count one
    each.

    Args:
        completions: b lists of messages; a plain text holds no messages and counts 0.

    Returns:
        (b,) int64.
    """
    counts = [
        0 if isinstance(completion, str) else sum(message.get("role") == "tool" for message in completion)
        for completion in completions
    ]
    return torch.tensor(counts, dtype=torch.int64)


def count_tag(texts: Sequence[str], tag: str) -> torch.Tensor:
    """Counts `tag` in each text, without overlaps: the tool calls of rollouts that are plain text.

    Returns:
        (b,) int64.
    """
    if not tag:
        raise ValueError("the tag must not be empty")
    return torch.tensor([text.count(tag) for text in texts], dtype=torch.int64)
