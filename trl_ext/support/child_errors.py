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
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C ended, as shells have it."""
_INTERRUPTED = "interrupted"


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


def note_interruption() -> int:
    """Notes for the parent that Ctrl-C ended this worker, and returns its exit code."""
    folder = os.environ.get(FOLDER)
    if folder and Path(folder).is_dir():
        write_atomically(Path(folder) / _INTERRUPTED, "")
    return INTERRUPTED


def interrupted(folder: str | Path, code: int) -> bool:
    """Returns whether Ctrl-C ended the run.

    Args:
        folder: Where the workers wrote.
        code: The exit code of the launcher. Of several workers it names any one.
    """
    return code in (INTERRUPTED, -signal.SIGINT) or (Path(folder) / _INTERRUPTED).exists()


def print_errors(folder: str | Path, code: int) -> int:
    """Prints each distinct error of the workers and returns the exit code of the run.

    Args:
        folder: Where the workers wrote.
        code: The exit code of the launcher, negative for a signal; `INTERRUPTED` if Ctrl-C ended the run.
    """
    entries = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))]
    by_hand = code == INTERRUPTED
    printed: set[str] = set()
    for entry in entries:
        if entry["message"] in printed:
            continue
        printed.add(entry["message"])
        if by_hand and not entry["ours"]:  # it missed a process that had left
            tell(f"note: a process then ended with {entry['message']}")
        else:
            print(entry["trace"], end="", file=sys.stderr)
            tell(f"error: {entry['message']}")
    if code == 0:
        return 0
    if by_hand:
        return 2 if any(entry["ours"] for entry in entries) else INTERRUPTED
    if entries:
        return 2 if all(entry["ours"] for entry in entries) else 1
    tell(f"error: {how_it_ended(code)}.")
    return 1


def how_it_ended(code: int | None) -> str:
    """Describes by its exit code how a training process ended that left no message."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
        return f"a training process was ended by {name}{hint}"
    return f"a training process ended with exit code {code} and left no message of its own"
