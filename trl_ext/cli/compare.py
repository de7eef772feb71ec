"""`trl_ext compare`: several plugin sets and plain TRL on one recipe."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from ..errors import OptionError

_DESCRIPTION = """\
Trains every arm of a recipe (plain TRL, plugin sets, settings) with every
seed, on the same data, and says what the runs show: means with bootstrap
confidence intervals over seeds, and whether an arm is better, worse or not
distinguishable. Every run is a process of its own. Runs that have ended are
kept and not repeated when the command is started again."""
_EPILOG = """\
examples:
  trl_ext compare recipes/tiny/gdpo.yaml
      ten seeds of GDPO and of plain GRPO on a small language model, in minutes
  trl_ext compare recipes/tiny/gdpo.yaml --seeds 2
      a quick look, whose runs the full comparison later uses
  trl_ext compare run.yaml --output runs/mine --json
      a file of your own, with your model and data, and the result as JSON

a recipe is a YAML file of TRL with two blocks more:
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
recipes/README.md explains every key.

The output folder gets compare.html (curves, table, completions side by side,
settings), compare.png, compare.json, and in runs/ a file per run.

Exit code 0: all runs ended and every expectation was met. 1: a run crashed or
diverged, or an expectation was not met. 2: something is wrong with the recipe
or the folder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument("--seeds", type=int, metavar="N", help="use the first N seeds of the recipe only")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="runs at a time (default: one per core, one in all with an accelerator)"
    )
    parser.add_argument("--output", metavar="FOLDER", help="output folder (default: runs/compare/<recipe>)")
    parser.add_argument("--record", metavar="FILE", help="also write the result, without curves and completions, here")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, without curves and completions")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..compare import html_report, plots, recipe, schedule, store, text_report
    from ..support.console import console, print_line
    from ..support.tables import print_table

    for name in ("seeds", "jobs"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise OptionError(f"--{name} {value}: expected a number of at least 1.")
    record = Path(args.record) if args.record else None
    if record is not None and not record.parent.is_dir():
        raise OptionError(f"--record {record}: there is no folder {record.parent}.")
    checked = recipe.read(args.recipe).with_seeds(args.seeds)
    folder = Path(args.output or Path("runs") / "compare" / checked.name)
    command = shlex.join(["trl_ext", "compare", args.recipe, *(["--seeds", str(args.seeds)] if args.seeds else [])])
    content = schedule.run_comparison(checked, folder, args.jobs, console(stderr=True), command)
    store.write_file(folder / "compare.html", html_report.render(content))
    store.write_file(folder / "compare.png", plots.picture(content))
    brief = {name: value for name, value in content.items() if name not in ("curves", "completions")}
    if record is not None:
        store.write(record, brief)
    if args.json:
        print(json.dumps(store.plain(brief), indent=1))
    else:
        print_table(text_report.COLUMNS, text_report.rows(content), title=content["claim"])
        for line in text_report.sentences(content):
            print_line(line)
        print_line(f"compare.html, compare.png, compare.json in {folder}")
    return 0 if content["complete"] and content["met"] else 1
