"""`trl_ext check`: the conformance checks of one plugin, a line for each."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..support.help import Parser

if TYPE_CHECKING:
    from ..testing.checks import Check

_DESCRIPTION = """\
Checks a plugin in seconds: trains it on a tiny model for two steps of every
trainer that it declares. Its hooks must fire, a gradient must flow, something
must differ from plain TRL, the same run must give the same numbers, resuming
must lose nothing, and switching it off must leave no trace. Every option of
`trl grpo`, `trl rloo` or `trl dpo` that is an argument of training is taken."""
_EPILOG = """\
what a run has, unless you say otherwise:
  model    two layers, 32 wide, untrained, with a character tokenizer
  rows     16 prompts "3+3=" with the columns prompt, answer, index (for DPO
           prompt, chosen, rejected)
  rewards  digits (their share in the text) and brevity
  sizes    8 rows, groups of 4, completions of 8 tokens, AdamW with 1e-2
  tools    a calculator, for a plugin with the need `tools`

examples:
  trl_ext check --plugin gdpo
  trl_ext check --plugin my_method.py --set my-method.floor=0.5
  trl_ext check --plugin my_method.py --rows my.jsonl \\
      --rewards my_rewards:correct my_rewards:brief
  trl_ext check --plugin my_method.py --num_iterations 2 --beta 0.04
  trl_ext check --plugin my_method.py --processes 2

Exit code 0 if every check passed, else 1.
"""


def build_parser() -> Parser:
    """Makes the parser of the command's own options."""
    parser = Parser("trl_ext check", usage="trl_ext check --plugin PLUGIN [options] [TRL options]")
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("--plugin", required=True, help="name, file.py or module:attribute")
    parser.add_argument("--set", nargs="+", default=[], metavar="PLUGIN.OPTION=VALUE", help="options of the plugin")
    parser.add_argument("--trainer", choices=["grpo", "rloo", "dpo"], help="check with this trainer only")
    parser.add_argument("--rows", metavar="FILE.jsonl", help="rows to train on, one JSON object per line")
    parser.add_argument("--rewards", nargs="+", metavar="MODULE:FUNCTION", help="reward functions")
    parser.add_argument("--processes", type=int, default=1, help="also compare this many processes with one")
    parser.add_argument("--json", action="store_true", help="print a list of {name, passed, detail}")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args, trl_options = build_parser().parse_known_args(argv)
    checks = _checks(args, trl_options)
    if args.json:
        print(json.dumps([vars(check) for check in checks], indent=2))
    else:
        from ..support.console import print_line

        for check in checks:
            mark, style = ("ok  ", "green") if check.passed else ("FAIL", "red")
            print_line(f" {check.name}: {check.detail}", mark, style)
    return 0 if all(check.passed for check in checks) else 1


def _checks(args: argparse.Namespace, trl_options: Sequence[str]) -> list[Check]:
    from ..catalog import find, options
    from ..support.console import status
    from ..testing.checks import conformance
    from ..trl_internals.arguments import training_options

    requests = find.merge([args.plugin], None, options.parse_set(args.set))
    ((reference, values),) = requests.items()
    settings: dict[str, Any] = {"processes": args.processes}
    if args.trainer:
        settings["kinds"] = (args.trainer,)
    if trl_options:
        settings |= training_options(args.trainer or "grpo", trl_options)
    if args.rows:
        settings["data"] = read_rows(Path(args.rows))
    if args.rewards:
        settings["rewards"] = _rewards(args.rewards)
    with tempfile.TemporaryDirectory() as folder, status() as show:
        return conformance(reference, folder, values, progress=show, **settings)


def read_rows(file: Path) -> Any:
    """Reads a dataset of one JSON object per line.

    Raises:
        ConfigError: The file is missing, or a line is something else.
    """
    from datasets import Dataset

    if not file.is_file():
        raise ConfigError(f"--rows {file}: there is no such file.")
    rows = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--rows {file}, line {number}: invalid JSON: {error}.") from None
        if not isinstance(row, dict):
            raise ConfigError(f"--rows {file}, line {number}: {type(row).__name__}, expected an object of columns.")
        rows.append(row)
    if not rows or "prompt" not in rows[0]:
        found = ", ".join(rows[0]) if rows else "none, as the file is empty"
        raise ConfigError(f"--rows {file}: expected the column `prompt`, found the columns {found}.")
    return Dataset.from_list(rows)


def _rewards(names: Sequence[str]) -> list[Any]:
    """Loads reward functions by `module:function`, or by a name of TRL's own."""
    from trl import rewards

    from ..errors import near
    from ..support.reward_functions import reward_functions

    paths = [name.replace(":", ".") for name in names]
    functions = reward_functions(paths)
    known = [name for name in dir(rewards) if name.endswith("_reward")]
    for path in paths:
        if path not in functions and path not in known:
            raise ConfigError(f"TRL has no reward function {path!r}.{near(path, known)} Yours: module:function.")
    return [functions[path] if path in functions else getattr(rewards, path) for path in paths]
