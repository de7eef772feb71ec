"""Functions and classes that an option names by their path."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from ..plugin import UsageError


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
