"""Calls of hooks: who implements them, in which order, how often each ran, and what a result must look like."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from trl_ext_hooks import Plugin
from trl_ext_hooks.basics import Logs

from ..catalog.declaration import build_manager
from ..errors import PluginError
from ..plan.compose import Plan
from ..plan.stages import ELSEWHERE, NO_STAGE, SERVED


class HookCalls:
    """The hooks of one trainer's plugins.

    Attributes:
        counts: (plugin, hook) -> how often it ran.
    """

    def __init__(self, plan: Plan) -> None:
        self.plugins: Mapping[str, Plugin] = plan.plugins
        self.counts: Counter[tuple[str, str]] = Counter()
        manager = build_manager(list(self.plugins.values()))
        self._callers: dict[str, list[tuple[str, Any]]] = {}
        for hook in SERVED[plan.kind]:
            self._callers[hook] = [
                (name, manager.subset_hook_caller(hook, [other for key, other in self.plugins.items() if key != name]))
                for name in plan.users(hook)
            ]

    def has(self, *hooks: str) -> bool:
        """Tells whether a plugin implements one of the hooks."""
        return any(self._callers.get(hook) for hook in hooks)

    def chain(self, hook: str) -> list[tuple[str, Any]]:
        """Returns (plugin, caller) in order, for stages in which each plugin sees the result of the one before."""
        return self._callers.get(hook, [])

    def call(self, name: str, hook: str, caller: Any, **arguments: Any) -> Any:
        """Runs one plugin's hook. What it raises keeps its type and gets a note with the names of both."""
        self.counts[name, hook] += 1
        # a round, micro-batch or batch of pairs logs under the name of the plugin that gets it
        arguments = {key: _logged_by(name, value) for key, value in arguments.items()}
        try:
            results = caller(**arguments)
        except Exception as error:
            error.add_note(f"raised in the hook {hook!r} of the trl_ext plugin {name!r}")
            raise
        return results[0] if results else None

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Yields (plugin, result) of every plugin with the hook, in order, where the result is not None."""
        for name, caller in self.chain(hook):
            result = self.call(name, hook, caller, **arguments)
            if result is not None:
                yield name, result

    def mappings(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Does the same for hooks whose result is a mapping.

        Raises:
            PluginError: A result is something else.
        """
        for name, result in self.each(hook, **arguments):
            yield name, as_mapping(name, hook, result)

    def metrics(self, hook: str, **arguments: Any) -> dict[str, tuple[float, float]]:
        """Runs a hook that reports metrics, and returns all of them as `<plugin>/<name>` -> (sum, count).

        Raises:
            PluginError: A value is no such pair.
        """
        reported: dict[str, tuple[float, float]] = {}
        for name, result in self.mappings(hook, **arguments):
            for key, value in result.items():
                if not (isinstance(value, tuple | list) and len(value) == 2):
                    raise PluginError(f"plugin {name!r} reported {key!r} as {value!r}, expected a pair (sum, count).")
                reported[f"{name}/{key}"] = (float(value[0]), float(value[1]))
        return reported

    def check_declared(self, name: str, hook: str, field: str) -> None:
        """Refuses a field that the plugin does not declare."""
        if field not in self.plugins[name].fields:
            declared = ", ".join(self.plugins[name].fields) or "none"
            raise PluginError(
                f"plugin {name!r} returned {field!r} from {hook!r} without declaring it; declared `fields`: {declared}."
            )

    def silent(self) -> list[str]:
        """Returns the stages that have not run yet, as `<plugin>.<hook>`."""
        return [
            f"{name}.{hook}"
            for hook, callers in self._callers.items()
            if hook not in (*NO_STAGE, *ELSEWHERE)
            for name, _ in callers
            if not self.counts[name, hook]
        ]


def _logged_by(plugin: str, value: Any) -> Any:
    """Returns an argument of a hook so that what is logged from it goes under the name of the plugin."""
    if not isinstance(value, Logs):
        return value
    return dataclasses.replace(value, metric_log=value.metric_log.of(plugin))


def as_mapping(name: str, hook: str, result: Any) -> Mapping[str, Any]:
    """Returns a hook's result, which must be a mapping."""
    if not isinstance(result, Mapping):
        raise PluginError(f"plugin {name!r} returned {type(result).__name__} from {hook!r}, expected a mapping.")
    return result
