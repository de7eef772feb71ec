"""Tools for runs from the command line and from YAML files: what a script passes to the trainer, by name.

TRL's command line knows reward functions by their dotted path and nothing about tools. This plugin takes tools, an
environment or a rollout function the same way. It changes no mathematics, and methods such as HDPO and OTC need it only
where no script builds the trainer.

Stage: before the trainer is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trl_ext_hooks import Plugin, Refuse, hookimpl, option
from trl_ext_hooks.toolkit.callables import load


class Tools(Plugin):
    """Gives GRPOTrainer tools, environments or a rollout function by their dotted paths."""

    name = "tools"
    summary = "tools, an environment or a rollout function by dotted path, for runs without a script"
    trainers = ("grpo",)

    @dataclass(frozen=True)
    class Options:
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
                    load(path)  # a wrong path is reported before anything else is loaded
            if self.environment_options and self.environment is None:
                raise ValueError("environment_options are for an environment, and none is named")

    options: Options

    @hookimpl
    def configure(self) -> Iterator[Refuse]:
        if self.options == self.Options():
            fix = "Set tools.functions, tools.environment or tools.rollout_func, such as [my_tools.calculator]."
            yield Refuse("no tool is named.", fix)

    @hookimpl
    def trainer_arguments(self) -> dict[str, Any]:
        options = self.options
        arguments: dict[str, Any] = {}
        if options.functions:
            arguments["tools"] = [load(path) for path in options.functions]
        if options.environment:
            factory = load(options.environment)
            made = factory(**options.environment_options) if options.environment_options else factory
            arguments["environment_factory"] = made
        if options.rollout_func:
            arguments["rollout_func"] = load(options.rollout_func)
        return arguments
