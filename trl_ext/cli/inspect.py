"""`trl_ext inspect`: recorded rounds, and what plugins did to them."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..catalog import find as plugins
from ..catalog import names
from ..errors import ConfigError, counted
from ..inspection.file_format import FOLDER, HOW, Recording, files, find, read
from ..support.console import tell
from ..support.help import Parser

PAGE = "inspect.html"
ONE_ROUND: dict[str, Any] = {
    "max_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
}
"""Settings of a run that is only looked at. The command line can change them, a YAML file cannot."""
DEMO = {"per_device_train_batch_size": 32}
"""Settings of the embedded default. Its untrained model earns few rewards, so more groups are needed to see any."""
_USAGE = """\
trl_ext inspect FOLDER_OR_FILE [--round K] [--group G ...] [--rows R ...] [--html PATH]
trl_ext inspect --plugin PLUGIN ... [options of `trl_ext train`]"""
_DESCRIPTION = """\
Shows what plugins did to a batch: rewards per function and advantages before
and after each plugin, completions with tokens coloured by advantage, and the
steps, spans and curves that plugins add. Prints it and writes a page that a
browser opens from disk, with details of every token.

With a folder or a file it shows what a run recorded with `trl_ext train
--inspect N` (`trl_ext.record` in Python). Without one it runs the first round
itself. It then takes every option of `trl_ext train`, uses the embedded
default if neither a model nor data is named, and saves no model. It writes
into a temporary folder, whatever the YAML file says, unless --output_dir is
given here."""
_EXAMPLES = """\
examples:
  trl_ext inspect --plugin gdpo
      one round of the embedded model and task, minutes at most
  trl_ext inspect --plugin gdpo my_method.py --config run.yaml \\
      --output_dir looks/first
      one round of your run with two plugins; the recording and the page stay
      in looks/first
  trl_ext train --plugin gdpo --inspect 3 --output_dir runs/a
  trl_ext inspect runs/a --round 3 --group all
      the third round of a run, with all its groups
  trl_ext inspect runs/a --rows 4 9 | less
      two rows as plain text

Rounds count from 1. Groups and rows count from 0, over all processes, as
plugins see them.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code.

    Args:
        argv: Everything after `trl_ext inspect`.
    """
    parser = build_parser()
    # a first argument that is no option is the folder or file to show
    given = list(argv)
    place = given.pop(0) if given and not given[0].startswith("-") else None
    args, rest = parser.parse_known_args(given)
    if place is None and not rest:
        raise ConfigError(
            "name what to look at: the output folder of a run that recorded rounds (trl_ext inspect runs/a), or "
            "plugins to record one round with (trl_ext inspect --plugin gdpo). See `trl_ext inspect --help`."
        )
    if place is not None and not Path(place).exists() and names.option_for(place, plugins.known()) == "--plugin":
        raise ConfigError(
            f"{place} is neither a file nor a folder. To record a round with the plugin, write `trl_ext inspect "
            f"--plugin {place}`."
        )
    if place is not None and rest:
        raise ConfigError(
            f"{' '.join(rest)}: with a folder or a file, `trl_ext inspect` takes --round, --group, --rows and --html. "
            f"Options of a run are for recording one: leave {place} out, or record with `trl_ext train --inspect N`."
        )
    if place is not None:
        return _show(place, args)
    code, place = _record(rest)
    return code or _show(place, args)


def build_parser() -> Parser:
    """Makes the parser of the options that look at a recording."""
    parser = Parser("trl_ext inspect", usage=_USAGE, description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument("--round", type=int, metavar="K", help="the round to print (default: the first recorded one)")
    parser.add_argument(
        "--group",
        nargs="+",
        metavar="G",
        help="groups to print in full, or `all` (default: one in which advantages differ)",
    )
    parser.add_argument("--rows", nargs="+", type=int, metavar="R", help="rows to print in full, instead of groups")
    parser.add_argument(
        "--html", metavar="PATH", help=f"where to write the page (default: {PAGE} beside the recordings)"
    )
    return parser


def _record(options: Sequence[str]) -> tuple[int, str]:
    """Trains one step with a recorder and returns the exit code and the output folder."""
    from ..train import output_folder
    from ..train.command_line import as_arguments
    from . import train

    # only --output_dir concerns this command, and `trl_ext train` reads everything else
    finder = Parser("trl_ext inspect", add_help=False)
    finder.add_argument("--output_dir", "--output-dir")
    given, options = finder.parse_known_args(options)
    folder = given.output_dir or tempfile.mkdtemp(prefix="trl_ext-inspect-")
    old_times = _recorded_at(folder)
    code = 1
    try:
        # the user's options come later and win over these
        defaults = [*as_arguments(ONE_ROUND), "--inspect", "1", "--no_save"]
        left = output_folder.contents(Path(folder))
        if left.record and not (left.weights or left.checkpoints or any("resume" in option for option in options)):
            defaults.append("--overwrite")  # what an earlier look left
        code = train.main([*defaults, *options, "--output_dir", folder], DEMO)
        if code == 0 and _recorded_at(folder) == old_times:
            raise ConfigError(
                "the run ended before a round was trained on, so nothing was recorded. Raise --max_steps, for example "
                "above the step of the checkpoint from which it resumes."
            )
    finally:
        if given.output_dir is None and not _recorded_at(folder):
            shutil.rmtree(folder)
    return code, folder


def _recorded_at(folder: str) -> list[int]:
    """Returns when the recordings of a run were written."""
    place = Path(folder) / FOLDER
    return [path.stat().st_mtime_ns for path in files(place)] if place.is_dir() else []


def _show(place: str, args: argparse.Namespace) -> int:
    from ..inspection import html, terminal

    paths = find(place)
    recordings = [read(path) for path in paths]
    recording = _choose_round(recordings, args.round)
    terminal.show(recording, _choose_rows(recording, args.group, args.rows))
    target = Path(args.html) if args.html is not None else paths[0].parent / PAGE
    html.write(recordings, target)
    tell(f"trl_ext: {counted(len(recordings), 'round')} as a page: {target.resolve()}")
    return 0


def _choose_round(recordings: Sequence[Recording], number: int | None) -> Recording:
    """Returns the recording of a round, the first one by default.

    Raises:
        ConfigError: The round was not recorded.
    """
    known = {recording.round: recording for recording in recordings}
    if number is None:
        return recordings[0]
    if number not in known:
        raise ConfigError(f"--round {number} is not recorded; recorded: {', '.join(map(str, sorted(known)))}. {HOW}")
    return known[number]


def _choose_rows(recording: Recording, groups: Sequence[str] | None, rows: Sequence[int] | None) -> set[int]:
    """Returns the numbers of the chosen rows, by default those of a group in which advantages differ.

    Raises:
        ConfigError: A group or a row was not recorded, or both are chosen.
    """
    if groups is not None and rows is not None:
        raise ConfigError("--group and --rows choose the same thing; give only one of them.")
    rows_by_group = recording.groups()
    left_out = f" Not recorded: {counted(recording.left_out, 'row')} of the round." if recording.left_out else ""
    if rows is not None:
        recorded = {row.row for row in recording.rows}
        missing = [row for row in rows if row not in recorded]
        if missing:
            raise ConfigError(
                f"--rows {missing[0]}: round {recording.round} has no such row; it has {_ranges(sorted(recorded))}."
                f"{left_out}"
            )
        return set(rows)
    if groups is None:
        groups = [str(recording.telling_group())]
    if "all" in groups:
        groups = [str(group) for group in rows_by_group]
    unknown = [group for group in groups if group not in map(str, rows_by_group)]
    if unknown:
        raise ConfigError(
            f"--group {unknown[0]}: round {recording.round} has no such group; it has {_ranges(list(rows_by_group))}, "
            f"or say `all`.{left_out}"
        )
    return {row.row for group, members in rows_by_group.items() if str(group) in groups for row in members}


def _ranges(numbers: Sequence[int]) -> str:
    """Writes numbers as ranges: `[0, 1, 2, 5]` -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
