"""`trl_ext show`: everything that one plugin declares."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import typing
from typing import Any

from ..errors import PluginError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description = "Prints what a plugin declares: its paper, trainers, needs, stages and options."
    parser.epilog = (
        "examples:\n  trl_ext show gdpo\n  trl_ext show my_method.py --json\n  trl_ext show gdpo --bibtex\n"
        "  trl_ext show my_package.module:Class"
    )
    parser.add_argument("plugin", metavar="NAME", help="name, file.py or module:attribute")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--bibtex", action="store_true", help="print only what a run with the plugin should cite")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..catalog import options
    from ..support.console import print_line
    from ..support.tables import print_table

    plugin = declaration(args.plugin)
    if args.bibtex:
        if not plugin["bibtex"]:
            raise PluginError(f"plugin {plugin['name']!r} names nothing to cite: its attribute `bibtex` is empty.")
        print(plugin["bibtex"])
        return 0
    if args.json:
        print(json.dumps(plugin, indent=2, default=str))
        return 0
    print_line(f"{plugin['name']} {plugin['version']} ({plugin['origin']})")
    print_line(plugin["summary"] or "no summary")
    print()
    rows = [
        [label, ", ".join(plugin[key])]
        for label, key in (
            ("trainers", "trainers"),
            ("stages", "hooks"),
            ("needs", "needs"),
            ("takes for itself", "claims"),
            ("adds to the batch", "fields"),
            ("keeps in checkpoints", "state"),
        )
        if plugin[key]
    ]
    print_table(["", ""], [["paper", plugin["paper"] or "none"], *rows])
    print()
    if not plugin["options"]:
        print("It has no options.")
        return 0
    print_table(
        ["option", "type", "default", "what it does", "source of the default"],
        [
            [
                option["name"],
                ", ".join([option["type"], *options.limits(option["bounds"])]),
                _written(option),
                option["help"],
                option["source"],
            ]
            for option in plugin["options"]
        ],
    )
    name, first = plugin["name"], plugin["options"][0]["name"]
    print()
    print_line(f"Set one with --set {name}.{first}=VALUE, or in YAML: plugins: {{{name}: {{{first}: VALUE}}}}")
    return 0


def declaration(reference: str) -> dict[str, Any]:
    """Returns what a plugin declares, as plain values."""
    from ..catalog import declaration as catalog_declaration
    from ..catalog import find
    from ..plan.stages import LIFECYCLE

    cls, origin, version = find.find(reference)
    hooks = catalog_declaration.implemented(cls)
    claims = {*cls.claims, *(catalog_declaration.IMPLIED & set(hooks))}
    return {
        "name": cls.name,
        "version": version,
        "origin": origin,
        "paper": cls.paper,
        "bibtex": inspect.cleandoc(cls.bibtex),
        "summary": cls.summary,
        "trainers": list(cls.trainers),
        "hooks": [hook for hook in hooks if hook not in LIFECYCLE],
        "lifecycle": [hook for hook in hooks if hook in LIFECYCLE],
        "needs": list(cls.needs),
        "claims": sorted(claims),
        "fields": list(cls.fields),
        "honours": list(cls.honours),
        "state": list(cls.state),
        "options": [
            _option(field, typing.get_type_hints(cls.Options, include_extras=True))
            for field in dataclasses.fields(cls.Options)
        ],
    }


def _option(field: dataclasses.Field[Any], hints: dict[str, Any]) -> dict[str, Any]:
    from ..catalog import options

    default = None
    if field.default is not dataclasses.MISSING:
        default = field.default
    elif field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    return {
        "name": field.name,
        "type": options.describe(hints[field.name]),
        "required": options.required(field),
        "default": default,
        "help": field.metadata.get("help", ""),
        "source": field.metadata.get("source", ""),
        "bounds": dict(field.metadata.get("bounds", {})),
    }


def _written(option: dict[str, Any]) -> str:
    """Returns the default of an option as it is written on the command line, where None is null."""
    if option["required"]:
        return "required"
    return "null" if option["default"] is None else repr(option["default"])
