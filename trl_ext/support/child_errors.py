"""Errors of child processes: each worker records its own, and the parent prints each distinct one once.

Every worker writes a file into a folder that the parent made.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from trl_ext_hooks import UsageError

from ..errors import TrlExtError
from .console import tell
from .files import write_atomically

FOLDER = "TRL_EXT_FAILURES"
"""Environment variable with the folder for the errors of the workers."""
TRACEBACK = "TRL_EXT_TRACEBACK"
"""Environment variable that asks for tracebacks of our own errors too."""


def write_error(error: BaseException) -> int:
    """Writes an error for the parent, or prints it if there is none, and returns the exit code of the worker."""
    ours = isinstance(error, TrlExtError | UsageError)
    message = str(error) if ours else f"{type(error).__name__}: {error}"
    verbose = not ours or os.environ.get(TRACEBACK) == "1"
    entry = {"message": message, "ours": ours, "trace": "".join(traceback.format_exception(error)) if verbose else ""}
    folder = os.environ.get(FOLDER)
    if folder and Path(folder).is_dir():
        rank = int(os.environ.get("RANK", "0"))
        write_atomically(Path(folder) / f"{rank:05d}.json", json.dumps(entry))
    else:
        print(f"{entry['trace']}error: {message}", file=sys.stderr)
    return 2 if ours else 1


def print_errors(folder: str | Path, code: int) -> int:
    """Prints each distinct error of the workers and returns the exit code of the run.

    Args:
        folder: Where the workers wrote.
        code: The exit code of the launcher, negative for a signal.
    """
    entries = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    printed: set[str] = set()
    for entry in entries:
        if entry["message"] not in printed:
            printed.add(entry["message"])
            print(entry["trace"], end="", file=sys.stderr)
            tell(f"error: {entry['message']}")
    if code == 0:
        return 0
    if entries:
        return 2 if all(entry["ours"] for entry in entries) else 1
    if code == 130 or code == -signal.SIGINT:
        print("interrupted", file=sys.stderr)
        return 130
    tell(f"error: {how_it_ended(code)}.")
    return 1


def how_it_ended(code: int | None) -> str:
    """Describes by its exit code how a training process ended that left no message."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
        return f"a training process was ended by {name}{hint}"
    return f"a training process ended with exit code {code} and left no message of its own"
