"""Checks of data and reward functions in the training process, before a model is loaded."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from trl_ext_hooks import TrainerKind

from .compat import scripts
from .errors import ConfigError, near

_COLUMNS: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": ("prompt",),
    "rloo": ("prompt",),
    "dpo": ("chosen", "rejected"),
}
"""Columns that TRL's trainers cannot do without."""


def check(
    kind: TrainerKind,
    parsed: scripts.Parsed,
    warn: Callable[[str], None],
    rewards: bool = True,
    columns: Sequence[str] | None = None,
    fields: Collection[str] = (),
) -> None:
    """Loads the training data and calls the reward functions on its first rows.

    Args:
        kind: The trainer.
        parsed: TRL's arguments.
        warn: Called with a sentence for what may fail later.
        rewards: Whether to call the reward functions.
        columns: Columns that the data must have; by default what the trainer needs.
        fields: Names of what plugins find in a rollout and pass to reward functions.

    Raises:
        ConfigError: The data cannot be loaded or lacks a column, or a reward function cannot be used.
    """
    functions = {} if kind == "dpo" else reward_functions(getattr(parsed[0], "reward_funcs", None) or ())
    try:
        data = scripts.load_data(parsed)
    except Exception as error:  # whatever the data library raises, with its text
        raise ConfigError(f"the training data cannot be loaded: {type(error).__name__}: {error}") from error
    if data is None:
        return
    rows = list(data.take(2))
    if not rows:
        raise ConfigError("the training data has no rows.")
    found = list(rows[0])
    needed = _COLUMNS[kind] if columns is None else columns
    missing = [name for name in needed if name not in found and f"{name}_ids" not in found]
    if missing:
        raise ConfigError(
            f"the training data has no column {missing[0]!r}, which the {kind.upper()} trainer needs; it has "
            f"{', '.join(found)}. Rename a column, or choose other data."
        )
    if rewards:
        check_rewards(functions, rows, warn, fields)


def _takes(function: Callable[..., Any], fields: Collection[str]) -> bool:
    try:
        return bool(set(inspect.signature(function).parameters) & set(fields))
    except ValueError:  # a callable written in C
        return False


def reward_functions(paths: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """The functions behind dotted paths; names of TRL's own rewards are left to TRL.

    Raises:
        ConfigError: A module or a function does not exist.
    """
    found: dict[str, Callable[..., Any]] = {}
    for path in paths:
        name, dot, attribute = path.rpartition(".")
        if not dot:
            continue
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # TRL looks there too
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(
                f"reward function {path!r}: importing {name!r} failed: {type(error).__name__}: {error} "
                f"(modules are looked for in {os.getcwd()} and on PYTHONPATH)."
            ) from error
        if not hasattr(module, attribute):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ConfigError(f"reward function {path!r}: {name!r} has no {attribute!r}.{near(attribute, own)}")
        found[path] = getattr(module, attribute)
    return found


def check_rewards(
    functions: Mapping[str, Callable[..., Any]],
    rows: Sequence[Mapping[str, Any]],
    warn: Callable[[str], None],
    fields: Collection[str] = (),
) -> None:
    """Calls every function as the trainer will, with empty completions, and checks the shape of what comes back.

    Functions that ask for one of the `fields`, which plugins find in a rollout, are left alone.

    Raises:
        ConfigError: A function returns something else than one number (or None) per completion.
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


def check_result(path: str, result: Any, expected: int) -> list[float | None]:
    """The rewards that a function returned, None where it does not apply.

    Raises:
        ConfigError: They are not one number (or None) per completion.
    """
    try:
        values = list(result)
    except TypeError:
        raise ConfigError(
            f"reward function {path!r} returned {type(result).__name__} for {expected} completions, expected a list "
            f"of {expected} numbers: one per completion."
        ) from None
    if len(values) != expected:
        raise ConfigError(
            f"reward function {path!r} returned {len(values)} rewards for {expected} completions, expected {expected}: "
            f"one per completion."
        )
    found: list[float | None] = []
    for value in values:
        try:
            found.append(None if value is None else float(value))
        except (TypeError, ValueError):
            raise ConfigError(
                f"reward function {path!r} returned {value!r}, expected a number, or None where it does not apply."
            ) from None
    return found
