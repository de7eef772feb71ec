"""`trl_ext plugins`: what can be given to `--plugin` here."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Lists the built-in plugins and those of installed packages. A plugin that cannot be used is listed with the\n"
        "reason; it disturbs nothing as long as nobody asks for it."
    )
    parser.epilog = "A plugin need not be installed: --plugin also takes my_method.py and my_package.module:Class."
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    from ..support.tables import print_table

    found = listing()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [
        [
            plugin["name"],
            f"{plugin['version']}, {plugin['origin']}",
            plugin["paper"],
            ", ".join(plugin["hooks"]),
            ", ".join(plugin["trainers"]),
            plugin["summary"],
        ]
        for plugin in found
        if plugin["broken"] is None
    ]
    print_table(["name", "version, origin", "paper", "stages", "trainers", "what it changes"], rows)
    for plugin in found:
        if plugin["broken"] is not None:
            print(f"broken: {plugin['name']}: {plugin['broken']}", file=sys.stderr)
    return 0


def listing() -> list[dict[str, Any]]:
    """Every plugin that has a name here, built-ins first; `broken` holds the reason why one cannot be used."""
    from ..catalog import builtins, declaration, find
    from ..errors import TrlExtError
    from ..plan.stages import LIFECYCLE

    names = [*sorted(builtins.BUILTINS), *sorted(set(find.outside()) - set(builtins.BUILTINS))]
    found: list[dict[str, Any]] = []
    for name in names:
        entry: dict[str, Any] = dict.fromkeys(("version", "origin", "paper", "summary", "broken"))
        entry |= {"name": name, "hooks": [], "trainers": []}
        try:
            cls, origin, version = find.find(name)
        except TrlExtError as error:
            entry["broken"] = str(error)
        else:
            hooks = [hook for hook in declaration.implemented(cls) if hook not in LIFECYCLE]
            entry |= {"version": version, "origin": origin, "paper": cls.paper, "summary": cls.summary}
            entry |= {"hooks": hooks, "trainers": list(cls.trainers)}
        found.append(entry)
    return found
