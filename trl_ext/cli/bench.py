"""`trl_ext bench`: measurements that anyone can repeat."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..support.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Benchmarks. Every figure is a ratio between runs that took turns in one process."
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    overhead = benches.add_parser("overhead", help="a step with idle plugins and with GDPO against plain TRL")
    overhead.add_argument(
        "--steps", type=int, default=40, help="training steps of each trainer, four trainers an arm (default: 40)"
    )
    overhead.add_argument("--json", action="store_true", help="print a list of objects")
    probes = benches.add_parser("probes", help="a step with SPAE's probes, with and without the prefix tree")
    probes.add_argument("--steps", type=int, default=6, help="counted training steps of each trainer (default: 6)")
    probes.add_argument("--length", type=int, default=512, help="tokens of a completion (default: 512)")
    probes.add_argument("--json", action="store_true", help="print a list of objects")
    shared = benches.add_parser(
        "shared-prefix",
        help="forward and backward with shared prefixes against TRL's dense path and PrefixGrouper",
        description="Measures forward and backward of completion log-probabilities on alternating paths: time, peak "
        "memory, differences of log-probabilities and gradients. PrefixGrouper takes part if it is installed.",
    )
    shared.add_argument(
        "--shape", action="append", metavar="PxGxS", help="prompt tokens x group size x completion tokens; repeatable"
    )
    shared.add_argument("--model", help="folder or hub id (default: a random 8-layer Llama of hidden size 512)")
    shared.add_argument("--repeats", type=int, default=3, help="counted rounds of every path (default: 3)")
    shared.add_argument("--trainer", action="store_true", help="measure whole GRPO update phases as well")
    shared.add_argument("--plot", metavar="FILE.png", help="draw speed-up against prompt length")
    shared.add_argument("--json", action="store_true", help="print a list of objects")


def run(args: argparse.Namespace) -> int:
    return {"overhead": _overhead, "probes": _probes, "shared-prefix": _shared_prefix}[args.bench](args)


def _overhead(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from ..bench.overhead import measure

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("rounds", total=None)
        rows = measure(args.steps, lambda done, total: bar.update(task, completed=done, total=total))
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    columns = ("arm", "step, processor time", "ratio to plain TRL", "95% interval")
    print_table(
        columns,
        [
            (
                row["name"],
                f"{1000 * row['seconds']:.1f} ms",
                f"{row['ratio']:.4f}",
                f"{row['ratio_low']:.4f} .. {row['ratio_high']:.4f}",
            )
            for row in rows
        ],
    )
    return 0


def _probes(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from ..bench.probes import measure

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("rounds", total=None)
        rows = measure(args.steps, args.length, lambda done, total: bar.update(task, completed=done, total=total))
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    lines = []
    for row in rows:
        ratio = "" if row["token_ratio"] is None else f"{row['token_ratio']:.1f}"
        lines.append((row["name"], f"{row['seconds']:.2f} s", f"{100 * row['share']:.0f}%", ratio))
    print_table(("arm", "step, processor time", "probing", "tokens of probes per computed token"), lines)
    return 0


def _shared_prefix(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..bench import shared_prefix, update_phase
    from ..errors import OptionError

    try:
        shapes = [shared_prefix.parse_shape(text) for text in args.shape or ()] or list(shared_prefix.DEFAULT_SHAPES)
    except ValueError as error:
        raise OptionError(f"--shape: {error}") from error
    console = Console(stderr=True, highlight=False)
    with console.status("building the model") as status:
        model = shared_prefix.load_model(args.model)
        rows = shared_prefix.measure(model, shapes, args.repeats, lambda text: status.update(text))
        found: list[dict[str, Any]] = shared_prefix.as_json(rows)
        for entry, shape in zip(found, shapes, strict=True) if args.trainer else ():
            status.update(f"{'x'.join(map(str, shape))}: GRPO update phase")
            entry["speedup_trainer"] = update_phase.measure(shape, args.repeats)["speedup"]
    if args.plot:
        shared_prefix.plot(rows, args.plot)
        console.print(f"wrote {args.plot}")
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    columns = [
        "P x G x S",
        "tokens",
        "FLOPs",
        "speed-up",
        "PrefixGrouper",
        "TRL's head",
        "plain logits",
        "memory",
        "log-prob diff",
        "grad diff",
    ]
    lines = []
    for entry in found:
        others = [entry[f"speedup_prefix_grouper{form}"] for form in ("", "_fused", "_logits")]
        lines.append(
            [
                f"{entry['prompt_length']} x {entry['group_size']} x {entry['completion_length']}",
                f"{entry['token_ratio']:.2f}",
                f"{entry['flop_ratio']:.2f}",
                f"{entry['speedup']:.2f}",
                *("not installed" if other is None else f"{other:.2f}" for other in others),
                f"{entry['peak_memory_ratio']:.2f}",
                f"{entry['max_logprob_diff']:.1e}",
                f"{entry['rel_grad_diff']:.1e}",
                *([f"{entry['speedup_trainer']:.2f}"] if args.trainer else []),
            ]
        )
    print_table([*columns, "GRPO update"] if args.trainer else columns, lines)
    print(
        "Ratios are dense by shared: above 1 the shared-prefix path is better. PrefixGrouper runs as documented, "
        "and with TRL's head or plain logits on completions only."
    )
    return 0
