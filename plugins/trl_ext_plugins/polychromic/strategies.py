"""Strategies of completions: functions for the option `strategy` of `polychromic`."""

from __future__ import annotations

from typing import Any


def last_text(completions: list[Any], **columns: Any) -> list[str | None]:
    """Takes the last message, without spaces around it, for the strategy: for answers of a word or a line.

    Where a prompt has one right answer, all that are right have one strategy then, and only wrong ones differ.
    """
    texts = [text if isinstance(text, str) else str(text[-1].get("content") or "") for text in completions]
    return [text.strip() or None for text in texts]


def known_answer(completions: list[Any], answers: list[Any], **columns: Any) -> list[str | None]:
    """Takes the last message for the strategy where it is in the row's list `answers`, a column of right answers.

    Wrong answers have no strategy then, so that only right ones make a set diverse.
    """
    return [text if text in known else None for text, known in zip(last_text(completions), answers, strict=True)]


def tools_called(completions: list[Any], **columns: Any) -> list[frozenset[str]]:
    """Takes the names of the tools that a completion calls, whatever their order, for the strategy."""
    calls = [
        [call for message in completion for call in message.get("tool_calls") or ()]
        if not isinstance(completion, str)
        else []
        for completion in completions
    ]
    return [frozenset(call.get("function", call)["name"] for call in each) for each in calls]
