"""`trl_ext show`: one plugin, with everything that it declares."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Prints what a plugin declares: its paper, trainers, needs, stages and options."
    parser.epilog = (
        "examples:\n  trl_ext show gdpo\n  trl_ext show my_method.py --json\n  trl_ext show my_package.module:Class"
    )
    parser.add_argument("plugin", metavar="NAME", help="name, file.py or module:attribute")
    parser.add_argument("--json", action="store_true", help="print one object")


def run(args: argparse.Namespace) -> int:
    from ..support.tables import print_table

    found = declaration(args.plugin)
    if args.json:
        print(json.dumps(found, indent=2, default=str))
        return 0
    print(f"{found['name']} {found['version']} ({found['origin']})")
    print(found["summary"] or "no summary")
    rows = [
        [label, ", ".join(found[key])]
        for label, key in (
            ("trainers", "trainers"),
            ("stages", "hooks"),
            ("needs", "needs"),
            ("takes for itself", "claims"),
            ("adds to the batch", "fields"),
        )
        if found[key]
    ]
    print_table(["", ""], [["paper", found["paper"] or "none"], *rows])
    if not found["options"]:
        print("It has no options.")
        return 0
    print_table(
        ["option", "type", "default", "what it does", "source of the default"],
        [
            [
                option["name"],
                option["type"],
                "required" if option["required"] else repr(option["default"]),
                option["help"],
                option["source"],
            ]
            for option in found["options"]
        ],
    )
    first = found["options"][0]["name"]
    name = found["name"]
    print(f"Set one with --set {name}.{first}=VALUE, or in YAML: plugins: {{{name}: {{{first}: VALUE}}}}")
    return 0


def declaration(reference: str) -> dict[str, Any]:
    """What a plugin declares, as plain values."""
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
        "summary": cls.summary,
        "trainers": list(cls.trainers),
        "hooks": [hook for hook in hooks if hook not in LIFECYCLE],
        "lifecycle": [hook for hook in hooks if hook in LIFECYCLE],
        "needs": list(cls.needs),
        "claims": sorted(claims),
        "fields": list(cls.fields),
        "honours": list(cls.honours),
        "options": [_option(field, typing.get_type_hints(cls.Options)) for field in dataclasses.fields(cls.Options)],
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
    }
