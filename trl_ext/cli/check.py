"""`trl_ext check`: the conformance checks as a table."""

from __future__ import annotations

import argparse
import json
import tempfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains a plugin for two steps of every trainer that it declares, on a tiny model, and checks that its hooks "
        "fire, that the same run gives the same numbers, that resuming loses nothing and that switching it off leaves "
        "no trace. Takes seconds."
    )
    parser.add_argument("--plugin", required=True, help="name, file.py or module:attribute")
    parser.add_argument("--set", nargs="+", default=[], metavar="PLUGIN.OPTION=VALUE", help="options of the plugin")
    parser.add_argument("--json", action="store_true", help="print a list of {name, passed, detail}")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..catalog import find, options
    from ..testing.checks import conformance

    requests = find.merge([args.plugin], None, options.parse_set(args.set))
    console = Console(stderr=True, highlight=False)
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        checks = conformance(
            next(iter(requests)), folder, next(iter(requests.values())), progress=lambda name: status.update(name)
        )
    if args.json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = "[green]ok[/]  " if check.passed else "[red]FAIL[/]"
            Console(highlight=False).print(f"{mark} {check.name}: {check.detail}", soft_wrap=True)
    return 0 if all(check.passed for check in checks) else 1
