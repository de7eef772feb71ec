"""How each built-in plugin is run on the tiny model: `smoke/<name>.py`, where the defaults will not do.

Such a file holds `OPTIONS`, the options of the plugin, and `settings(kind, folder)`, the arguments of `tiny_trainer`
that the plugin needs on a trainer; `rewards` and `columns` (of the data) are added to those of other plugins.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_hooks import Plugin, hookimpl

MERGED: dict[str, Callable[[Any, Any], Any]] = {
    "max_completion_length": max,
    "max_tool_calling_iterations": max,
    "generation_kwargs": lambda one, other: {"sequence_bias": [*one["sequence_bias"], *other["sequence_bias"]]},
}
"""How settings that two plugins ask for become one, where a difference does no harm."""
FOLDER = Path(__file__).parent / "smoke"
Smoke = tuple[dict[str, dict[str, Any]], dict[str, Any]]


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[..., Smoke]:
    """`smoke(kind, *names)` gives what to enable, and the arguments of `tiny_trainer` that suit all of the plugins."""

    def combine(kind: str, *names: str) -> Smoke:
        requests: dict[str, dict[str, Any]] = {}
        together: dict[str, Any] = {}
        rewards: list[Any] = []
        columns: dict[str, list[Any]] = {}
        for name in names:
            module = _load(name)
            requests[name] = getattr(module, "OPTIONS", {})
            found = dict(module.settings(kind, tmp_path)) if hasattr(module, "settings") else {}
            rewards += [function for function in found.pop("rewards", []) if function not in rewards]
            columns |= found.pop("columns", {})
            for key, value in found.items():
                if key in together and key in MERGED:
                    value = MERGED[key](together.pop(key), value)
                assert together.setdefault(key, value) == value, f"{' and '.join(names)} disagree about {key}"
        if "tools" in names:  # it brings them, and two givers are refused
            together.get("trainer", {}).pop("tools", None)
        if kind != "dpo":
            together["rewards"] = [digits, brevity, *rewards]
        if columns:
            data = tiny_data(kind)
            for column, values in columns.items():
                data = data.add_column(column, values)
            together["data"] = data
        return requests, together

    return combine


def _load(name: str) -> Any:
    file = FOLDER / f"{name.replace('-', '_')}.py"
    if not file.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"smoke_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # options may name its functions
    spec.loader.exec_module(module)
    return module


class Look(Plugin):
    """Keeps every finished round."""

    name = "look"
    trainers = ("grpo", "rloo")

    def start(self) -> None:
        self.rounds: list[Any] = []

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


@pytest.fixture
def look(plugin: Callable[[type], str]) -> str:
    """A plugin that keeps every finished round: `trainer._trl_ext.plugins["look"].rounds`."""
    return plugin(Look)
