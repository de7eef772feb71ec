"""`trl_ext plugins`: every plugin that `--plugin` knows by name."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    from ..catalog.declaration import KINDS

    parser.description = (
        "Lists the built-in plugins and those of installed packages. A plugin that\n"
        "cannot be used is listed with the reason. It does no harm as long as nobody\n"
        "asks for it."
    )
    parser.epilog = (
        "examples:\n"
        "  trl_ext plugins --trainer dpo\n"
        "  trl_ext plugins --search tool\n\n"
        "`trl_ext show NAME` prints a plugin in full: paper, stages, needs, options.\n"
        "A plugin need not be installed: --plugin also takes my_method.py and\nmy_package.module:Class."
    )
    parser.add_argument(
        "--search", metavar="WORD", help="only plugins with WORD in name, summary, paper, package or stages"
    )
    parser.add_argument("--trainer", choices=KINDS, type=str.lower, help="only plugins for this trainer of TRL")
    parser.add_argument("--json", action="store_true", help="print a list of objects, with version, paper and stages")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code: 1 if no plugin is as asked for."""
    from ..support.console import tell
    from ..support.tables import print_table

    plugins = [plugin for plugin in listing() if _matches(plugin, args.search, args.trainer)]
    if args.json:
        print(json.dumps(plugins, indent=2))
        return 0 if plugins else 1
    usable = [plugin for plugin in plugins if plugin["broken"] is None]
    if usable:
        rows = [[plugin["name"], ", ".join(plugin["trainers"]), plugin["summary"]] for plugin in usable]
        print_table(["name", "trainers", "what it changes"], rows)
    for plugin in plugins:
        if plugin["broken"] is not None:
            tell(f"broken: {plugin['name']}: {plugin['broken']}")
    if not plugins:
        tell("no plugin is as asked for. `trl_ext plugins` lists all.")
    return 0 if plugins else 1


def _matches(plugin: dict[str, Any], word: str | None, trainer: str | None) -> bool:
    """Returns whether a plugin serves a trainer and has a word in what `listing` says about it.

    A broken plugin serves no trainer that is known.
    """
    texts = [*(plugin[key] or "" for key in ("name", "summary", "paper", "origin")), *plugin["hooks"]]
    found = word is None or any(word.lower() in text.lower() for text in texts)
    return found and (trainer is None or trainer in plugin["trainers"])


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
