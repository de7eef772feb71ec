"""Small helpers for defining tasks: messages, the text of completions, and draws that depend on a text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def user(text: str) -> list[dict[str, Any]]:
    """A prompt: one message of the user."""
    return [{"role": "user", "content": text}]


def assistant(text: str, prefix: str = "") -> list[dict[str, Any]]:
    """A completion: one message. `prefix` stands before the text, is shown to the model and is not learnt."""
    message = {"role": "assistant", "content": text}
    return [message | {"prefix": prefix} if prefix else message]


def final_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """What the assistant says last; nothing where a completion ends with a call or with the result of one."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {"role": "assistant"}
    if last["role"] != "assistant" or last.get("tool_calls"):
        return ""
    return str(last.get("content") or "")


def tool_messages(completion: str | Sequence[dict[str, Any]]) -> int:
    """How many results of tools the model has seen."""
    return 0 if isinstance(completion, str) else sum(message["role"] == "tool" for message in completion)


def drawn(text: str, low: int, high: int) -> int:
    """An integer from `low` to `high` that looks random and depends on the text only; the same on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return low + int.from_bytes(digest[:8], "big") % (high - low + 1)


def in_split(text: str, split: str, share: int = 8) -> bool:
    """Whether a question belongs to a split: one of `share` is held out, always the same ones."""
    return (drawn(f"split {text}", 0, share - 1) == 0) == (split == "test")
