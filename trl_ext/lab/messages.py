"""Messages and episodes for definitions of tasks, and other small helpers for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def user(text: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes a prompt of one message of the user, with a text or with blocks of texts and images."""
    return [{"role": "user", "content": text}]


def assistant(text: str, prefix: str = "") -> list[dict[str, Any]]:
    """Makes a completion of one message. `prefix` stands before the text, is shown to the model and is not learnt."""
    message = {"role": "assistant", "content": text}
    return [message | {"prefix": prefix} if prefix else message]


def call(tool: str, **arguments: Any) -> dict[str, Any]:
    """Makes a message of the assistant that calls a tool."""
    function = {"name": tool, "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(tool: str, text: Any) -> dict[str, Any]:
    """Makes the message with what a tool returned: a text, or a list of blocks with images."""
    return {"role": "tool", "name": tool, "content": text if isinstance(text, list) else str(text)}


def episode(
    environment: Any, row: Mapping[str, Any], choose: Callable[[Any], tuple[str, dict[str, Any]]], bye: str
) -> dict[str, Any]:
    """Plays an episode until it is `done` or `truncated`, and returns it as a trace.

    Args:
        environment: Has `reset`, tools as methods, `done` and `truncated`.
        row: A row of the task. Its prompt is followed by what `reset` returns.
        choose: Returns the name of a tool and its arguments, for what was seen last.
        bye: What the assistant says in the end.
    """
    observation, text = environment.reset(**row), row["prompt"][-1]["content"]
    with_images = isinstance(observation, list)
    prompt = user([{"type": "text", "text": text}, *observation] if with_images else text + observation)
    completion: list[dict[str, Any]] = []
    while not (environment.done or environment.truncated):
        tool, arguments = choose(observation)
        observation = getattr(environment, tool)(**arguments)
        completion += [call(tool, **arguments), result(tool, observation)]
    return {"prompt": prompt, "completion": completion + assistant(bye)}


def final_text(completion: str | Sequence[dict[str, Any]]) -> str:
    """Returns the last text of the assistant, or nothing if a completion ends with a call or with its result."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {"role": "assistant"}
    if last["role"] != "assistant" or last.get("tool_calls"):
        return ""
    return str(last.get("content") or "")


def calls_made(completion: str | Sequence[dict[str, Any]]) -> int:
    """Counts the calls of tools whose results the model has seen."""
    return 0 if isinstance(completion, str) else sum(message["role"] == "tool" for message in completion)


def hashed_integer(text: str, low: int, high: int) -> int:
    """Returns an integer from `low` to `high` that looks random and depends on the text only, on every machine."""
    digest = hashlib.sha256(text.encode()).digest()
    return low + int.from_bytes(digest[:8], "big") % (high - low + 1)


def by_kind(kinds: Sequence[str], values: Sequence[float | None], name: str) -> dict[str, list[float | None]]:
    """Divides values by kind of row, for the behaviour of a task: `name_KIND` has None for rows of other kinds."""
    return {
        f"{name}_{kind}": [value if row_kind == kind else None for row_kind, value in zip(kinds, values, strict=True)]
        for kind in dict.fromkeys(kinds)
    }


def in_split(text: str, split: str, share: int = 8) -> bool:
    """Returns whether a question belongs to a split. One of `share` questions is held out, always the same ones."""
    return (hashed_integer(f"split {text}", 0, share - 1) == 0) == (split == "test")
