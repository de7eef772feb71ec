"""`trl_ext schema`: a JSON Schema of the YAML file of a run, for editors."""

from __future__ import annotations

import argparse
import json
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    from ..catalog.declaration import KINDS

    parser.description = (
        "Prints a JSON Schema (draft 2020-12) of the YAML file that `trl_ext train`\n"
        "takes: the options of TRL's trainer with TRL's help, those of\n"
        "`accelerate launch`, ours, and those of every installed plugin with their\n"
        "types, bounds and defaults."
    )
    parser.epilog = (
        "examples:\n"
        "  trl_ext schema > trl_ext.schema.json\n"
        "  trl_ext schema dpo > dpo.schema.json\n\n"
        "first line of a YAML file, for editors with the YAML language server:\n"
        "  # yaml-language-server: $schema=trl_ext.schema.json\n\n"
        "Print it again after an update of TRL, or after installing a plugin."
    )
    parser.add_argument(
        "trainer", nargs="?", choices=KINDS, help="the trainer (default: the options of all three, in one schema)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    from ..catalog.declaration import KINDS
    from ..compare.recipe import Experiment
    from ..train import command_line

    command_line.say("loading TRL")
    from ..train import schema

    def warn(text: str) -> None:
        print(f"note: {text}", file=sys.stderr)

    experiment = Experiment.model_json_schema(ref_template="#/$defs/{model}")
    kinds = KINDS if args.trainer is None else (args.trainer,)
    print(json.dumps(schema.build(kinds, experiment, warn), indent=2))
    return 0
