"""Functions and classes that an option names by their path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ..plugin import UsageError
from ..trainer import TrainerView

_Result = TypeVar("_Result")


def load(path: str, method: str = "__call__") -> Any:
    """Returns what a path such as `my_tools:calculator` or `my_tools.calculator` names.

    Modules are looked for in the working directory too, where TRL looks for reward functions. A plugin whose option is
    such a path calls it in `__post_init__` of its options or in `configure`, so that a wrong path stops the run early.

    Args:
        path: Module and name.
        method: A method that makes an object acceptable which cannot be called itself.

    Raises:
        UsageError: The module cannot be imported, or it holds nothing of that name that can be called.
    """
    module, separator, name = path.rpartition(":" if ":" in path else ".")
    if not separator:
        raise UsageError(f"{path!r} is not a dotted path, such as my_tools.calculator")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        home = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        raise UsageError(f"{path!r}: importing {module!r} failed: {type(error).__name__}: {error}") from error
    target: Any = getattr(home, name, None)
    if not (callable(target) or hasattr(target, method)):
        defined = [key for key, value in vars(home).items() if getattr(value, "__module__", None) == module]
        known = ", ".join(sorted(key for key in defined if not key.startswith("_"))) or "none"
        raise UsageError(f"{path!r}: {module!r} has no function {name!r}; it has {known}")
    return target


def call_together(
    trainer: TrainerView, function: Callable[[], _Result], stopped: type[Exception] = UsageError
) -> _Result:
    """Calls a function on every process at the same point, and returns what it gave on this one. Collective.

    An error on one process stops all of them. Otherwise the others would wait for it for ever.

    Args:
        trainer: The trainer.
        function: The function. It makes no collective call.
        stopped: Type of the error on the processes where the function did not fail. On the others it keeps its type.
    """
    failure: Exception | None = None
    result: _Result
    try:
        result = function()
    except Exception as error:  # raised below, when the other processes know of it
        failure = error
    failures = trainer.gather_objects([None if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    if any(failures):
        raise stopped(f"stopped with another process: {next(text for text in failures if text)}")
    return result
