"""`trl_ext bench`: benchmarks that anyone can repeat."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..support.tables import print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one parser for each benchmark."""
    parser.description = "Measures trainers that take turns in one process. Every figure is a ratio."
    benches = parser.add_subparsers(dest="bench", required=True, metavar="NAME")
    overhead = benches.add_parser("overhead", help="a step with idle plugins and with GDPO, against plain TRL")
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
        help="forward and backward with shared prefixes, against TRL's dense path and PrefixGrouper",
        description="Measures forward and backward of completion log-probabilities on alternating paths: time, peak "
        "memory, and how far log-probabilities and gradients differ. PrefixGrouper takes part if it is installed.",
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
    """Runs the chosen benchmark and returns the exit code."""
    {"overhead": _overhead, "probes": _probes, "shared-prefix": _shared_prefix}[args.bench](args)
    return 0


def _overhead(args: argparse.Namespace) -> None:
    from ..bench.overhead import measure
    from ..support.console import progress_bar

    with progress_bar("rounds") as advance:
        rows = measure(args.steps, advance)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print_table(
        ("arm", "step, processor time", "ratio to plain TRL", "95% interval"),
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


def _probes(args: argparse.Namespace) -> None:
    from ..bench.probes import measure
    from ..support.console import progress_bar

    with progress_bar("rounds") as advance:
        rows = measure(args.steps, args.length, advance)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    lines = []
    for row in rows:
        ratio = "" if row["token_ratio"] is None else f"{row['token_ratio']:.1f}"
        lines.append((row["name"], f"{row['seconds']:.2f} s", f"{100 * row['share']:.0f}%", ratio))
    print_table(("arm", "step, processor time", "probing", "tokens of probes per computed token"), lines)


def _shared_prefix(args: argparse.Namespace) -> None:
    from ..bench import shared_prefix, update_phase
    from ..errors import OptionError
    from ..support.console import print_line, status

    try:
        shapes = [shared_prefix.parse_shape(text) for text in args.shape or ()] or list(shared_prefix.DEFAULT_SHAPES)
    except ValueError as error:
        raise OptionError(f"--shape: {error}") from error
    with status("building the model") as show:
        model = shared_prefix.load_model(args.model)
        rows = shared_prefix.measure(model, shapes, args.repeats, show)
        entries = shared_prefix.as_json(rows)
        if args.trainer:
            for entry, shape in zip(entries, shapes, strict=True):
                show(f"{'x'.join(map(str, shape))}: GRPO update phase")
                entry["speedup_trainer"] = update_phase.measure(shape, args.repeats)["speedup"]
    if args.plot:
        from ..bench import speedup_plot

        speedup_plot.draw(rows, args.plot)
        print_line(f"wrote {args.plot}", stderr=True)
    if args.json:
        print(json.dumps(entries, indent=2))
    else:
        _print_shapes(entries, args.trainer)


def _print_shapes(entries: list[dict[str, Any]], with_trainer: bool) -> None:
    from ..support.console import print_line

    columns = [
        *("P x G x S", "tokens", "FLOPs", "speed-up", "PrefixGrouper", "TRL's head", "plain logits"),
        *("memory", "log-prob diff", "grad diff", *(["GRPO update"] if with_trainer else [])),
    ]
    lines = []
    for entry in entries:
        groupers = [entry[f"speedup_prefix_grouper{form}"] for form in ("", "_fused", "_logits")]
        lines.append(
            [
                f"{entry['prompt_length']} x {entry['group_size']} x {entry['completion_length']}",
                f"{entry['token_ratio']:.2f}",
                f"{entry['flop_ratio']:.2f}",
                f"{entry['speedup']:.2f}",
                *("not installed" if speedup is None else f"{speedup:.2f}" for speedup in groupers),
                f"{entry['peak_memory_ratio']:.2f}",
                f"{entry['max_logprob_diff']:.1e}",
                f"{entry['rel_grad_diff']:.1e}",
                *([f"{entry['speedup_trainer']:.2f}"] if with_trainer else []),
            ]
        )
    print_table(columns, lines)
    print()
    print_line(
        "Ratios are dense by shared: above 1 the shared-prefix path is better. PrefixGrouper runs as documented, "
        "and with TRL's head or plain logits on completions only."
    )
