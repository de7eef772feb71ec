"""Reward functions by dotted path, and the check of what they return."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, near


def reward_functions(paths: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Imports reward functions. Names without a dot are rewards of TRL, which loads them itself.

    Raises:
        ConfigError: A module or a function does not exist.
    """
    functions: dict[str, Callable[..., Any]] = {}
    for path in paths:
        name, dot, attribute = path.rpartition(".")
        if not dot:
            continue  # a reward of TRL
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # where TRL looks too
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(
                f"reward function {path!r}: importing {name!r} failed: {type(error).__name__}: {error} "
                f"(modules are looked for in {os.getcwd()} and on PYTHONPATH)."
            ) from error
        if not hasattr(module, attribute):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ConfigError(f"reward function {path!r}: {name!r} has no {attribute!r}.{near(attribute, public)}")
        functions[path] = getattr(module, attribute)
    return functions


def is_async(function: Any) -> bool:
    """Tells whether TRL awaits a reward function: a coroutine function, or an object whose call is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def parameters(function: Callable[..., Any]) -> tuple[set[str], set[str]]:
    """Returns the parameters that a reward function names, and those of them that have no default.

    Both are empty where Python cannot tell, as for callables written in C.
    """
    try:
        signature = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return set(), set()
    named = [entry for entry in signature if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]
    return {entry.name for entry in named}, {entry.name for entry in named if entry.default is entry.empty}


def check_result(path: str, result: Any, expected: int) -> list[float | None]:
    """Returns the rewards that a function returned, None where it does not apply.

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
    rewards: list[float | None] = []
    for value in values:
        try:
            if isinstance(value, str | bytes):
                raise TypeError("a text is no reward, also where it spells a number")
            rewards.append(None if value is None else float(value))
        except (TypeError, ValueError):
            raise ConfigError(
                f"reward function {path!r} returned {value!r}, expected a number, or None where it does not apply."
            ) from None
    return rewards


def infinite_rewards(source: str, rewards: Sequence[float | None]) -> str | None:
    """Returns the error about infinite rewards, if there are some.

    Args:
        source: Who returned them, as the beginning of a sentence.
        rewards: One per completion; None and NaN, which mean that a reward does not apply, are fine.
    """
    infinite = [value for value in rewards if value is not None and math.isinf(value)]
    if not infinite:
        return None
    return (
        f"{source} returned {infinite[0]} for {len(infinite)} of {len(rewards)} completions. One infinite reward "
        f"spoils its whole group. Return a finite number below 3e38 instead, such as a lower bound, or None where "
        f"the reward does not apply."
    )
