"""Checks of data and reward functions in the training process, before the model is loaded."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError
from ..support.reward_functions import check_result, reward_functions
from ..trl_internals import arguments as trl_arguments
from ..trl_internals import scripts

_COLUMNS: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": ("prompt",),
    "rloo": ("prompt",),
    "dpo": ("chosen", "rejected"),
}
"""Columns that TRL's trainers need."""


def check(
    kind: TrainerKind,
    parsed: trl_arguments.Parsed,
    warn: Callable[[str], None],
    rewards: bool = True,
    columns: Sequence[str] | None = None,
    fields: Collection[str] = (),
) -> None:
    """Loads the training data and calls the reward functions on its first rows.

    Args:
        kind: The trainer.
        parsed: TRL's arguments.
        warn: Called with a sentence about what may fail later.
        rewards: Whether to call the reward functions.
        columns: Columns that the data must have. By default those that the trainer needs.
        fields: Names of what plugins find in a rollout and pass to reward functions.

    Raises:
        ConfigError: The data cannot be loaded or lacks a column, or a reward function cannot be used.
    """
    functions = {} if kind == "dpo" else reward_functions(getattr(parsed[0], "reward_funcs", None) or ())
    try:
        data = trl_arguments.load_data(parsed)
    except Exception as error:  # whatever the data library raises, with its text
        raise ConfigError(f"the training data cannot be loaded: {type(error).__name__}: {error}") from error
    if data is None:
        return
    rows = list(data.take(2))
    if not rows:
        raise ConfigError("the training data has no rows.")
    present = list(rows[0])
    needed = _COLUMNS[kind] if columns is None else columns
    missing = [name for name in needed if name not in present and f"{name}_ids" not in present]
    if missing:
        raise ConfigError(
            f"the training data has no column {missing[0]!r}, which the {kind.upper()} trainer needs; it has "
            f"{', '.join(present)}. Rename a column, or choose other data."
        )
    if rewards:
        check_rewards(functions, rows, warn, fields)


def _takes(function: Callable[..., Any], fields: Collection[str]) -> bool:
    """Returns whether a function has a parameter with the name of a field."""
    try:
        return bool(set(inspect.signature(function).parameters) & set(fields))
    except ValueError:  # a callable written in C
        return False


def check_rewards(
    functions: Mapping[str, Callable[..., Any]],
    rows: Sequence[Mapping[str, Any]],
    warn: Callable[[str], None],
    fields: Collection[str] = (),
) -> None:
    """Calls every reward function as the trainer will, on empty completions, and checks what it returns.

    Functions that ask for one of the `fields`, which plugins find in a rollout, are not called.

    Raises:
        ConfigError: A function does not return one number (or None) per completion.
    """
    from torch.nn import Module
    from transformers import TrainerState

    conversational = isinstance(rows[0]["prompt"], list)
    empty: Any = [{"role": "assistant", "content": ""}] if conversational else ""
    ignored = ("prompt", "completion", "completion_ids")
    for path, function in functions.items():
        if isinstance(function, Module) or _takes(function, fields):
            continue
        arguments: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name not in ignored}
        arguments |= {"prompts": [row["prompt"] for row in rows], "completions": [empty for _ in rows]}
        arguments |= {"completion_ids": [[] for _ in rows], "trainer_state": TrainerState()}
        arguments |= {"log_extra": lambda *_: None, "log_metric": lambda *_: None}
        try:
            result = function(**arguments)
            if scripts.is_async(function):
                result = asyncio.run(result)
        except Exception as error:  # an empty completion is a hard case, so this is not an error yet
            warn(
                f"reward function {path!r} raised {type(error).__name__}: {error} when it was called on empty "
                f"completions; training would stop with the same error if the model answers with nothing."
            )
            continue
        check_result(path, result, len(rows))
