"""`trl_ext check`: the conformance checks of one plugin, a line for each."""

from __future__ import annotations

import argparse
import json
import tempfile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.description = (
        "Checks a plugin in seconds: trains it on a tiny model for two steps of every\n"
        "trainer that it declares. Its hooks must fire, the same run must give the same\n"
        "numbers, resuming must lose nothing, and switching it off must leave no trace."
    )
    parser.epilog = (
        "examples:\n  trl_ext check --plugin gdpo\n  trl_ext check --plugin my_method.py --set my-method.floor=0.5"
    )
    parser.add_argument("--plugin", required=True, help="name, file.py or module:attribute")
    parser.add_argument("--set", nargs="+", default=[], metavar="PLUGIN.OPTION=VALUE", help="options of the plugin")
    parser.add_argument("--json", action="store_true", help="print a list of {name, passed, detail}")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..catalog import find, options
    from ..support.console import print_line, status
    from ..testing.checks import conformance

    requests = find.merge([args.plugin], None, options.parse_set(args.set))
    ((reference, values),) = requests.items()
    with tempfile.TemporaryDirectory() as folder, status() as show:
        checks = conformance(reference, folder, values, progress=show)
    if args.json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark, style = ("ok  ", "green") if check.passed else ("FAIL", "red")
            print_line(f" {check.name}: {check.detail}", mark, style)
    return 0 if all(check.passed for check in checks) else 1
