"""Messages and texts of completions: how many tool calls they hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def count_tool_messages(completions: Sequence[Any]) -> torch.Tensor:
    """Counts the messages with the role `tool` in each completion.

    They are the executed calls whose results the completion holds. A failed call is answered by a message too. Parallel
    calls in one turn count one each. `count_executed_calls` also counts calls whose results were taken back.

    Args:
        completions: b lists of messages; a plain text holds no messages and counts 0.

    Returns:
        (b,) int64.
    """
    return torch.tensor([_results(completion) for completion in completions], dtype=torch.int64)


def count_executed_calls(completions: Sequence[Any], iterations: int) -> torch.Tensor:
    """Counts the calls that TRL's tool loop executed for each completion.

    In its iteration j the loop executes all calls of the j-th message that calls. Where their results would not fit, it
    takes the messages with the results back, but the calls were executed and count. Calls that the model wrote after
    the last iteration were not executed.

    Args:
        completions: b lists of messages; a plain text holds no messages and counts 0.
        iterations: Iterations that the loop may make; 0 where no loop runs. Then only results count.

    Returns:
        (b,) int64.
    """
    counts = []
    for completion in completions:
        messages = () if isinstance(completion, str) else completion
        calls = [len(message["tool_calls"]) for message in messages if message.get("tool_calls")]
        counts.append(max(sum(calls[:iterations]), _results(completion)))
    return torch.tensor(counts, dtype=torch.int64)


def _results(completion: Any) -> int:
    """Returns the number of messages with the role `tool`."""
    return 0 if isinstance(completion, str) else sum(message.get("role") == "tool" for message in completion)


def count_tag(texts: Sequence[str], tag: str) -> torch.Tensor:
    """Counts `tag` in each text, without overlaps: the tool calls of rollouts that are plain text.

    Returns:
        (b,) int64.
    """
    if not tag:
        raise ValueError("the tag must not be empty")
    return torch.tensor([text.count(tag) for text in texts], dtype=torch.int64)
