"""Reward functions by dotted path, and the shape of what they return."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, near


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
