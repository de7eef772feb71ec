"""The store of a comparison: a JSON file for each run that has ended, under a name that tells whether it still counts.

A record is written when its run has ended and never changed, so a comparison that was killed goes on with the runs that
have none. Its name holds a hash of everything that determines the run. What does not determine it, such as the metrics
that are looked at, can be changed without repeating anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import TrlExtError
from ..support.files import write_atomically
from .runs import Run


class UnwritableError(TrlExtError):
    """A file of the comparison cannot be written. Every other run would meet the same."""


def load(run: Run) -> dict[str, Any] | None:
    """Returns the record of a run that has ended before, or None.

    Raises:
        TrlExtError: The file is damaged.
    """
    try:
        record = json.loads(run.file(".json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TrlExtError(f"{run.file('.json')} is not a record of a run ({error}). Remove it.") from error
    return dict(record) if record.get("key") == run.key else None


def save(run: Run, content: Mapping[str, Any]) -> None:
    """Writes the record of a run that has ended."""
    write(run.file(".json"), {"arm": run.arm, "seed": run.seed, "key": run.key, **content})


def crashed(run: Run, message: str) -> dict[str, Any]:
    """Returns what stands in for the record of a run that has crashed."""
    content = {"status": "crashed", "error": message, "history": [], "completions": {}, "steps": 0, "seconds": 0.0}
    return {"arm": run.arm, "seed": run.seed, "key": run.key, **content}


def write(file: Path, content: Any) -> None:
    """Writes JSON, as `write_file`."""
    write_file(file, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def write_file(file: Path, content: str | bytes) -> None:
    """Writes a file of a comparison, whole or not at all.

    Raises:
        UnwritableError: The disk is full, or the folder cannot be written.
    """
    try:
        write_atomically(file, content)
    except OSError as error:
        raise UnwritableError(
            f"cannot write {file}: {error.strerror or error}. Runs that have ended are kept: make room or choose "
            f"another folder with --output, and start the same command again."
        ) from error


def make_folder(folder: Path) -> None:
    """Makes the output folder of a comparison.

    Raises:
        UnwritableError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(
            f"cannot write into {folder}: {error.strerror or error}. Choose another folder with --output."
        ) from error


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it: numbers that are not finite become null, unknown types become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
