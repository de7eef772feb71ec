"""`trl_ext plugins`: every plugin that `--plugin` knows by name."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description = (
        "Lists the built-in plugins and those of installed packages. A plugin that\n"
        "cannot be used is listed with the reason. It does no harm as long as nobody\n"
        "asks for it."
    )
    parser.epilog = "A plugin need not be installed: --plugin also takes my_method.py and\nmy_package.module:Class."
    parser.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..support.tables import print_table

    plugins = listing()
    if args.json:
        print(json.dumps(plugins, indent=2))
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
        for plugin in plugins
        if plugin["broken"] is None
    ]
    print_table(["name", "version, origin", "paper", "stages", "trainers", "what it changes"], rows)
    for plugin in plugins:
        if plugin["broken"] is not None:
            print(f"broken: {plugin['name']}: {plugin['broken']}", file=sys.stderr)
    return 0


def listing() -> list[dict[str, Any]]:
    """Describes every plugin that has a name, built-ins first. `broken` says why one cannot be used."""
    from ..catalog import builtins, declaration, find
    from ..errors import TrlExtError
    from ..plan.stages import LIFECYCLE

    names = [*sorted(builtins.BUILTINS), *sorted(set(find.outside()) - set(builtins.BUILTINS))]
    entries: list[dict[str, Any]] = []
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
        entries.append(entry)
    return entries
