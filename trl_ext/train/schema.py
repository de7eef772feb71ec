"""JSON Schema of the YAML file of a run, for editors: TRL's options, accelerate's, ours, and those of every plugin."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_ext_hooks import TrainerKind

from ..catalog import builtins, find
from ..errors import TrlExtError
from ..support.json_schema import DIALECT, any_of, described, of_dataclass, of_type, plain
from ..trl_internals import accepted_values
from ..trl_internals import launch as trl_launch
from ..trl_internals.arguments import Setting, trl_parser
from .command_line import file_keys
from .config_keys import LISTS, arms_of

_FILE = r"(\.py|:)"
"""Marks a plugin that is named by its file or by `module:attribute`."""


def build(kinds: Sequence[TrainerKind], experiment: Mapping[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Returns the schema.

    Args:
        kinds: The trainers whose options the file may hold.
        experiment: The schema of the block `experiment:`.
        warn: Called with a sentence about a plugin that cannot be used.
    """
    definitions = dict(experiment.get("$defs", {}))
    plugins = _plugins(definitions, warn)
    properties = {
        "plugins": described(plugins, "Plugins of the run in the order in which they act, with their options."),
        "experiment": {name: value for name, value in experiment.items() if name not in ("$defs", "title")},
        "env": described({"type": "object"}, "Environment variables, set before TRL is loaded."),
    }
    properties |= {name: _of_action(action) for name, action in file_keys().items()}
    properties |= {name: _of_action(action) for name, action in trl_launch.options().items()}
    properties |= _of_trl(kinds)
    return {
        "$schema": DIALECT,
        "title": f"A run of trl_ext with {' or '.join(kind.upper() for kind in kinds)}",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _plugins(definitions: dict[str, Any], warn: Callable[[str], None]) -> dict[str, Any]:
    """Returns the schema of the block `plugins:`, and adds one for every plugin that has a name."""
    references = {}
    for name in [*builtins.BUILTINS, *sorted(set(find.outside()) - set(builtins.BUILTINS))]:
        try:
            cls, _, _ = find.find(name)
        except TrlExtError as error:
            warn(f"plugin {name!r} is left out: {error}")
            continue
        options = any_of([of_dataclass(cls.Options), {"type": "null"}])
        paper = f" ({cls.paper})" if cls.paper else ""
        definitions[f"plugin.{name}"] = described(options, f"{cls.summary}{paper}")
        for spelling in dict.fromkeys((name, name.replace("-", "_"))):
            references[spelling] = {"$ref": f"#/$defs/plugin.{name}"}
    return {
        "type": ["object", "null"],
        "properties": references,
        "patternProperties": {_FILE: {"type": ["object", "null"]}},
        "additionalProperties": False,
    }


def _of_trl(kinds: Sequence[TrainerKind]) -> dict[str, dict[str, Any]]:
    """Returns the schemas of TRL's options. One that trainers describe differently takes what any of them takes."""
    found: dict[str, list[tuple[dict[str, Any], Setting]]] = {}
    for kind in kinds:
        accepted = accepted_values.accepted(kind)
        for name, setting in trl_parser(kind).settings().items():
            found.setdefault(name, []).append((_of_setting(name, setting, accepted.get(name)), setting))
    return {
        name: described(any_of([schema for schema, _ in entries]), entries[0][1].help, entries[0][1].default)
        for name, entries in found.items()
    }


def _of_setting(name: str, setting: Setting, accepted: frozenset[str] | None) -> dict[str, Any]:
    """Returns the schema of an option of TRL.

    Args:
        name: Its name.
        setting: The option.
        accepted: The texts that the trainer tells apart, None if it takes any.
    """
    arms = [of_type(arm) for arm in arms_of(setting.hint)]
    text: dict[str, Any] = {"type": "string"} if accepted is None else {"enum": sorted(accepted)}
    if setting.choices is not None:
        arms = [{"enum": [plain(choice) for choice in setting.choices]}]
    elif {"type": "string"} in arms:
        arms = [text if arm == {"type": "string"} else arm for arm in arms]
        if accepted is None or "none" in accepted:  # TRL and transformers take true and false too, as in `fsdp: true`
            arms.append({"type": "boolean"})
    elif {"type": "array", "items": {"type": "string"}} in arms and name not in LISTS:
        arms.append(text)  # they take a text for a list of one
    for index, arm in enumerate(arms):
        if arm == {"type": "array", "items": {"type": "string"}}:
            arms[index] = {"type": "array", "items": text}
    return any_of([*arms, {"type": "null"}] if setting.default is None else arms)


def _of_action(action: argparse.Action) -> dict[str, Any]:
    """Returns the schema of an option of an `argparse` parser other than TRL's."""
    if action.choices is not None:
        schema: dict[str, Any] = {"enum": list(action.choices)}
    elif action.nargs == 0:
        schema = {"type": "boolean"}
    else:
        schema = {int: {"type": "integer"}, float: {"type": "number"}}.get(action.type, {})  # type: ignore[call-overload]
    default = action.default if action.default not in (None, argparse.SUPPRESS) else None
    help = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
    return described(schema, help.replace("%%", "%"), default)
