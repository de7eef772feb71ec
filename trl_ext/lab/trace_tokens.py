"""Tokens of traces: what a model is warmed up on, and which of it is learnt."""

from __future__ import annotations

import json
from typing import Any

from . import pictures
from .definition import Row, Task
from .tokenizer import UNKNOWN, tools_of

NOT_LEARNT = -100
"""Label of a token that the loss leaves out."""


def written(task: Task, traces: list[Row]) -> str:
    """Writes traces as JSON, pictures included.

    Raises:
        ConfigError: A trace holds something else.
    """
    try:
        return json.dumps(traces, default=pictures.as_json)
    except TypeError as error:
        raise task.broken(f"traces must be made of texts, numbers, lists, dictionaries and images: {error}") from error


def tokenized(task: Task, tokenizer: Any, traces: list[Row]) -> list[Row]:
    """Tokenizes traces that come from JSON.

    Returns:
        Rows with `input_ids`, with `labels`, which leave out prompts, prefixes and results of tools, and with
        `pictures` if the task has them.

    Raises:
        ConfigError: A trace does not fit the task.
    """
    rows = []
    tools = tools_of(task) or None
    for number, trace in enumerate(traces):
        if not {"prompt", "completion"} <= set(trace):
            raise task.broken(f"trace {number} must have `prompt` and `completion`; it has {sorted(trace)}.")
        messages = trace["prompt"] + trace["completion"]
        prompt = tokenizer.apply_chat_template(
            trace["prompt"], tools=tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        whole = tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learnt = whole["input_ids"], whole["assistant_masks"]
        if task.shape.picture:
            # the template writes one token for a picture, and the model wants one for each of its patches
            prompt, _ = pictures.expanded(prompt, prompt, task.shape, tokenizer)
            ids, learnt = pictures.expanded(ids, learnt, task.shape, tokenizer)
        _check(task, tokenizer, number, messages, prompt, ids)
        # a prefix is part of the message of the assistant, but the template leaves it out of the mask
        labels = [
            token if index >= len(prompt) and learn else NOT_LEARNT
            for index, (token, learn) in enumerate(zip(ids, learnt, strict=True))
        ]
        row: Row = {"input_ids": ids, "labels": labels}
        if task.shape.picture:
            row["pictures"] = pictures.in_order(messages)
        rows.append(row)
    return rows


def _check(task: Task, tokenizer: Any, number: int, messages: list[Row], prompt: list[int], ids: list[int]) -> None:
    """Refuses a trace that the model could not imitate."""
    if tokenizer.convert_tokens_to_ids(UNKNOWN) in ids:
        raise task.broken(f"trace {number} has characters that are not tokens; add them to `words`: {messages}")
    if ids[: len(prompt)] != prompt:
        raise task.broken(f"trace {number} must have a completion that begins with a message of the assistant.")
    length = len(ids) - len(prompt)
    if length > task.max_completion_length:
        raise task.broken(
            f"trace {number} has {length} tokens after the prompt, more than `max_completion_length` "
            f"({task.max_completion_length})."
        )
    if len(ids) > task.shape.positions:
        raise task.broken(
            f"trace {number} has {len(ids)} tokens, more than `shape.positions` ({task.shape.positions})."
        )
