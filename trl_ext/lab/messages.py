"""Small helpers for defining tasks: messages, episodes, texts of completions, draws that depend on a text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def user(text: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt: one message of the user, of a text or of blocks with images."""
    return [{"role": "user", "content": text}]


def assistant(text: str, prefix: str = "") -> list[dict[str, Any]]:
    """A completion: one message. `prefix` stands before the text, is shown to the model and is not learnt."""
    message = {"role": "assistant", "content": text}
    return [message | {"prefix": prefix} if prefix else message]


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    """A message of the assistant that calls a tool."""
    function = {"name": tool, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(tool: str, text: Any) -> dict[str, Any]:
    """The message with what a tool returned: a text, or a list of blocks with images."""
    return {"role": "tool", "name": tool, "content": text if isinstance(text, list) else str(text)}


def episode(
    environment: Any, row: Mapping[str, Any], choose: Callable[[Any], tuple[str, dict[str, Any]]], bye: str
) -> dict[str, Any]:
    """A trace: one episode of a row, played until it is `done` or `truncated`.

    Args:
        environment: With `reset`, its tools as methods, `done` and `truncated`.
        row: Of the task; its prompt is followed by what `reset` returns.
        choose: From what was seen last to the name of a tool and its arguments.
        bye: What the assistant says in the end.
    """
    seen, text = environment.reset(**row), row["prompt"][-1]["content"]
    prompt = user([{"type": "text", "text": text}, *seen] if isinstance(seen, list) else text + seen)
    completion: list[dict[str, Any]] = []
    while not (environment.done or environment.truncated):
        tool, arguments = choose(seen)
        seen = getattr(environment, tool)(**arguments)
        completion += [call(tool, **arguments), result(tool, seen)]
    return {"prompt": prompt, "completion": completion + assistant(bye)}


def final_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """What the assistant says last; nothing where a completion ends with a call or with the result of one."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {"role": "assistant"}
    if last["role"] != "assistant" or last.get("tool_calls"):
        return ""
    return str(last.get("content") or "")


def calls_made(completion: str | Sequence[dict[str, Any]]) -> int:
    """How many calls of tools were carried out and their results shown to the model."""
    return 0 if isinstance(completion, str) else sum(message["role"] == "tool" for message in completion)


def drawn(text: str, low: int, high: int) -> int:
    """An integer from `low` to `high` that looks random and depends on the text only; the same on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return low + int.from_bytes(digest[:8], "big") % (high - low + 1)


def by_kind(kinds: Sequence[str], values: Sequence[float | None], name: str) -> dict[str, list[float | None]]:
    """Values by kind of row, for the behaviour of a task: `name_KIND` -> the values of that kind, None elsewhere."""
    return {
        f"{name}_{kind}": [value if of == kind else None for of, value in zip(kinds, values, strict=True)]
        for kind in dict.fromkeys(kinds)
    }


def in_split(text: str, split: str, share: int = 8) -> bool:
    """Whether a question belongs to a split: one of `share` is held out, always the same ones."""
    return (drawn(f"split {text}", 0, share - 1) == 0) == (split == "test")
