"""Tools for runs from the command line and from YAML files: what a script passes to the trainer, by name.

TRL's command line knows reward functions by their dotted path and nothing about tools. This plugin takes tools, an
environment or a rollout function the same way. It changes no mathematics, and methods such as HDPO and OTC need it only
where no script builds the trainer.

Stage: before the trainer is built.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trl_ext_hooks import Plugin, Refuse, Requirement, hookimpl, option


@dataclass(frozen=True)
class ToolsOptions:
    """Options of the tools; at least one must be set."""

    functions: tuple[str, ...] = option(
        (), help="tools by dotted path: typed functions with Google-style docstrings", source="ours"
    )
    environment: str | None = option(
        None, help="dotted path of a class whose methods are tools, one instance per rollout", source="ours"
    )
    environment_options: dict[str, Any] = option(
        {}, help="if given, the class is what `environment` returns when called with these", source="ours"
    )
    rollout_func: str | None = option(None, help="dotted path of a function that makes rollouts", source="ours")

    def __post_init__(self) -> None:
        for path in (*self.functions, self.environment, self.rollout_func):
            if path is not None:
                load(path)  # a wrong path is told before anything else is loaded
        if self.environment_options and self.environment is None:
            raise ValueError("environment_options are for an environment, and none is named")


def load(path: str) -> Callable[..., Any]:
    """What a dotted path such as `my_tools.calculator` names; modules are looked for where TRL looks for rewards too.

    Raises:
        ValueError: The module cannot be imported, or holds nothing callable of that name.
    """
    module, dot, name = path.rpartition(".")
    if not dot:
        raise ValueError(f"{path!r} is no dotted path, such as my_tools.calculator")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        home = importlib.import_module(module)
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"{path!r}: importing {module!r} failed: {type(error).__name__}: {error}") from error
    found = getattr(home, name, None)
    if not callable(found):
        own = [key for key, value in vars(home).items() if getattr(value, "__module__", None) == module]
        known = ", ".join(sorted(key for key in own if not key.startswith("_"))) or "none"
        raise ValueError(f"{path!r}: {module!r} has no function {name!r}; it has {known}")
    return found


class Tools(Plugin):
    """Gives GRPOTrainer tools, environments or a rollout function by their dotted paths."""

    name = "tools"
    summary = "tools, an environment or a rollout function by dotted path, for runs without a script"
    trainers = ("grpo",)
    Options = ToolsOptions

    options: ToolsOptions

    @hookimpl
    def configure(self) -> list[Requirement]:
        if self.options == ToolsOptions():
            fix = "Set tools.functions, tools.environment or tools.rollout_func, such as [my_tools.calculator]."
            return [Refuse("no tool is named.", fix)]
        return []

    @hookimpl
    def trainer_arguments(self) -> dict[str, Any]:
        chosen = self.options
        given: dict[str, Any] = {}
        if chosen.functions:
            given["tools"] = [load(path) for path in chosen.functions]
        if chosen.environment:
            found = load(chosen.environment)
            given["environment_factory"] = found(**chosen.environment_options) if chosen.environment_options else found
        if chosen.rollout_func:
            given["rollout_func"] = load(chosen.rollout_func)
        return given
