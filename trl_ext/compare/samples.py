"""Rows of a round as text and numbers, for people who want to see what an arm writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = 8
"""Rows of a round that a record keeps."""
PER_PROMPT = 2


def sample(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns two completions each of as many prompts as there is room for."""
    taken: dict[str, int] = {}
    kept: list[dict[str, Any]] = []
    for row in rows:
        prompt = as_text(row["prompt"])
        taken[prompt] = taken.get(prompt, 0) + 1
        if taken[prompt] <= PER_PROMPT and len(kept) < ROWS:
            kept.append({**row, "prompt": prompt, "completion": as_text(row["completion"])})
    return kept


def as_text(value: Any) -> str:
    """Returns a prompt or a completion as text: the content of one message, or `role: content` of several."""
    if isinstance(value, str):
        return value
    if len(value) == 1 and not value[0].get("tool_calls"):
        return _content(value[0])
    return "\n".join(f"{message.get('role')}: {_with_calls(message)}" for message in value)


def _with_calls(message: Mapping[str, Any]) -> str:
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    texts = [_content(message), *(f"{call['name']}({call['arguments']})" for call in calls)]
    return " ".join(text for text in texts if text)


def _content(message: Mapping[str, Any]) -> str:
    """Returns the content of a message: a text, or blocks of which some are images."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(f"[{block['type']}]" if block["type"] != "text" else block["text"] for block in content)
    return str(content or "")
