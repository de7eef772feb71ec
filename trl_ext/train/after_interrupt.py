"""What is left of an interrupted run, and the command line that goes on with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support.files import write_atomically
from . import output_folder

_RESUME = ("--resume_from_checkpoint", "--resume-from-checkpoint")


def last_complete(folder: Path, last_file: str | None) -> Path | None:
    """Returns the last checkpoint that was written to its end, which a kill may have prevented.

    Args:
        folder: The output folder.
        last_file: The file that plugins write last into a checkpoint. None if there are no plugins.
    """
    for checkpoint in reversed(output_folder.contents(folder).checkpoints):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        if last_file is None or (checkpoint / last_file).is_file():
            return checkpoint
    return None


def end_record(folder: Path, started: str, status: str) -> dict[str, Any]:
    """Says in the record of a run how it ended, and returns what the run itself had written.

    Args:
        folder: The output folder.
        started: When the run was started, as in its record. The record of another run is left alone.
        status: `interrupted` or `failed`.

    Returns:
        The record, empty if the run wrote none.
    """
    record = output_folder.read_record(folder)
    if not record or record.get("started") != started:
        return {}
    if record["status"] != status:
        content = json.dumps(record | {"status": status}, indent=2)
        write_atomically(folder / output_folder.RECORD, content + "\n")
    return record


def resume_command(argv: Sequence[str], checkpoint: str) -> str:
    """Writes the command line that goes on from a checkpoint.

    Args:
        argv: The command line of the user.
        checkpoint: The checkpoint, or `true` for the last one.
    """
    kept: list[str] = []
    skip = False
    for argument in argv:
        if skip:
            skip = False
        elif argument in _RESUME:
            skip = True
        elif argument != "--overwrite" and argument.partition("=")[0] not in _RESUME:
            kept.append(argument)
    return shlex.join([*kept, _RESUME[0], checkpoint])


def lines(folder: Path, record: dict[str, Any], argv: Sequence[str], last_file: str | None) -> list[str]:
    """Returns lines about an interrupted run: how far it came, what is saved, and how it goes on.

    Args:
        folder: The output folder.
        record: The record of the run, empty if training had not begun.
        argv: The command line of the user.
        last_file: As in `last_complete`.
    """
    again = f"start it again with: {shlex.join(argv)}"
    if not record:
        return ["interrupted before training began; nothing was written", again]
    where = "interrupted"
    if record["status"] != "running":  # as when training began
        where += f" after step {record['steps']} of {record['max_steps']}"
    checkpoint = last_complete(folder, last_file)
    if checkpoint is None:
        return [
            f"{where}; no checkpoint was written, so nothing of the training is saved",
            f"{again} --save_on_interrupt" if "--save_on_interrupt" not in argv else again,
        ]
    return [
        f"{where}; saved: {checkpoint}",
        f"go on with: {resume_command(argv, str(checkpoint))}",
    ]


def owned(folder: Path, argv: Sequence[str]) -> list[str]:
    """Returns the lines for a run that a plugin owns, which keeps and finds what its trainings have finished."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return ["interrupted before anything was written", f"start it again with: {shlex.join(argv)}"]
    return [f"interrupted; what is finished is in {folder}", f"go on with: {resume_command(argv, 'true')}"]
