"""`trl_ext compare`: several plugin sets and plain TRL on one recipe, or runs that have ended."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import OptionError

_DESCRIPTION = """\
Trains every arm of a recipe (plain TRL, plugin sets, settings) with every
seed, on the same data, and says what the runs show: means with bootstrap
confidence intervals over seeds, and whether an arm is better, worse or not
distinguishable. Every run is a process of its own. Runs that have ended are
kept and not repeated when the command is started again.

With folders in place of a recipe it trains nothing and compares runs that have
ended: output folders of `trl_ext train`, or of TRL with a trainer_state.json."""
_EPILOG = """\
examples:
  trl_ext compare gdpo
      ten seeds of GDPO and of plain GRPO on a small language model, in minutes
  trl_ext compare gdpo --seeds 2
      a quick look, whose runs the full comparison later uses
  trl_ext compare run.yaml --output runs/mine --json
      a file of your own, with your model and data, and the result as JSON
  trl_ext compare runs/plain runs/gdpo
      two finished runs side by side, without a verdict, as each is one seed
  trl_ext compare plain=runs/p1 plain=runs/p2 gdpo=runs/g1 gdpo=runs/g2
      two runs of each arm, with intervals; a folder that holds the folders of
      several runs is an arm too

`trl_ext recipes` lists the recipes that come with trl_ext. One of your own is a
YAML file of TRL with two blocks more:
  learning_rate: 1.0e-3
  max_steps: 100
  plugins:
    gdpo: {}
  experiment:
    task: loud-quiet  # or model_name_or_path and dataset_name above
    seeds: 10
    metrics:
      - name: rewards/quiet/mean  # anything that the runs log
        reduce: {steps_to: 0.9}
        expect: {arm: gdpo, is: better, against: plain}
`trl_ext recipes` also says where the guide to every key is.

The output folder gets compare.html (curves, table, completions side by side,
settings), compare.png, compare.json, and in runs/ a file per run.

Exit code 0: all runs ended and every expectation was met, apart from those that
the recipe states as not met. 1: a run crashed or diverged, or an expectation
was not met. 2: something is wrong with the recipe or the folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.usage = "trl_ext compare RECIPE [options]\n       trl_ext compare [NAME=]FOLDER [NAME=]FOLDER ... [options]"
    parser.add_argument("what", nargs="+", metavar="RECIPE|FOLDER", help="recipe (name or YAML file), or finished runs")
    parser.add_argument("--seeds", type=int, metavar="N", help="use the first N seeds of the recipe only")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one per core, one in all with an accelerator)"
    )
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        metavar="NAME",
        help="logged metrics of finished runs to compare (default: rewards and length)",
    )
    parser.add_argument("--output", metavar="FOLDER", help="output folder (default: runs/compare/NAME)")
    parser.add_argument("--record", metavar="FILE", help="also write the result, without curves and completions, here")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, without curves and completions")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..catalog import recipes
    from ..compare import html_report, plots, store, text_report, verdicts
    from ..support.console import console, print_line, status
    from ..support.tables import print_table

    for name in ("seeds", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise OptionError(f"--{name} {value}: expected a number of at least 1.")
    record = Path(args.record) if args.record else None
    if record is not None and not record.parent.is_dir():
        raise OptionError(f"--record {record}: there is no folder {record.parent}.")
    first = args.what[0]
    finished = len(args.what) > 1 or (Path(first).is_dir() and first not in recipes.recipes())
    folder, content = _of_runs(args) if finished else _of_recipe(args)
    with status("drawing the report", console(stderr=True)):
        store.write_file(folder / "compare.html", html_report.render(content))
        store.write_file(folder / "compare.png", plots.picture(content))
    brief = {name: value for name, value in content.items() if name not in ("curves", "completions")}
    if record is not None:
        store.write(record, brief)
    if args.json:
        print(json.dumps(store.plain(brief), indent=1))
    else:
        print_table(text_report.COLUMNS, text_report.rows(content), title=content["headline"])
        for line in text_report.sentences(content):
            print_line(line)
        print_line(f"compare.html, compare.png, compare.json in {folder}")
    return 0 if content["complete"] and verdicts.as_stated(content) else 1


def _of_recipe(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Does the runs of a recipe. Returns the output folder and the content of `compare.json`."""
    from ..compare import recipe, schedule
    from ..support.console import console

    (reference,) = args.what
    if args.metric:
        raise OptionError("--metric goes with finished runs. A recipe names its own in `experiment: {metrics: ...}`.")
    checked = recipe.read(reference).with_seeds(args.seeds)
    folder = Path(args.output or Path("runs") / "compare" / checked.name)
    command = shlex.join(["trl_ext", "compare", reference, *(["--seeds", str(args.seeds)] if args.seeds else [])])
    return folder, schedule.run_comparison(checked, folder, args.jobs, console(stderr=True), command)


def _of_runs(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Reads finished runs. Returns the output folder and the content of `compare.json`."""
    from ..compare import finished_runs, side_by_side, store

    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None:
            raise OptionError(f"--{name} goes with a recipe, and {' '.join(args.what)} are finished runs. Omit it.")
    arms = finished_runs.arms(args.what)
    chosen = ["--metric", *args.metric] if args.metric else []
    content = side_by_side.compare(arms, args.metric, shlex.join(["trl_ext", "compare", *args.what, *chosen]))
    name = "-against-".join(re.sub(r"[^\w.+-]+", "-", arm) for arm in arms)
    folder = Path(args.output or Path("runs") / "compare" / name)
    store.make_folder(folder)
    store.write(folder / "compare.json", content)
    return folder, content
