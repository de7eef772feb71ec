"""`trl_ext bench`: measurements that anyone can repeat."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Benchmarks. Every figure is a ratio between runs that took turns in one process."
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    overhead = benches.add_parser("overhead", help="step time with idle plugins and with GDPO against plain TRL")
    overhead.add_argument("--steps", type=int, default=40, help="training steps of each arm (default: 40)")
    overhead.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from ..bench.overhead import measure

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("steps", total=args.steps)
        rows = measure(args.steps, lambda done, total: bar.update(task, completed=done, total=total))
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = Table("arm", "step", "ratio to plain TRL", "quartiles of the ratio")
    for row in rows:
        quartiles = f"{row['ratio_low']:.3f} .. {row['ratio_high']:.3f}"
        table.add_row(row["name"], f"{1000 * row['seconds']:.1f} ms", f"{row['ratio']:.3f}", quartiles)
    Console(highlight=False).print(table)
    return 0
