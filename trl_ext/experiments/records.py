"""What a run leaves on disk: one JSON file, under a name that tells whether it can be used again.

A record is written when the run has ended and never changed, so a comparison that was killed goes on with the runs that
have none. Its name holds a hash of everything that determines the run; what does not, such as the metrics that are
looked at, can be changed without repeating anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from trl_ext_hooks import TrainerKind

from ..errors import TrlExtError
from ..support.files import write_atomically


class UnwritableError(TrlExtError):
    """A record or a report cannot be written; every other run would meet the same."""


Status = Literal["finished", "diverged", "crashed"]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One run to do: an arm with a seed.

    Attributes:
        arm: Name of the arm.
        seed: Of the run and of its data.
        kind: The trainer.
        plugins: Plugin reference -> options, as the user gave them.
        settings: TRL settings of the recipe and of the arm.
        task: Reference of a task, or None where the settings name model and data.
        sizes: Sizes of the task's data.
        identity: What determines the numbers besides the seed, found by `preparing`.
        folder: Where records and logs go.
    """

    arm: str
    seed: int
    kind: TrainerKind
    plugins: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    task: str | None
    sizes: dict[str, int]
    identity: dict[str, Any]
    folder: str

    @property
    def key(self) -> str:
        text = json.dumps([self.identity, self.seed], sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()

    def file(self, ending: str) -> Path:
        """The file of this run with an ending such as `.json`."""
        return Path(self.folder) / f"{self.arm}-{self.seed}-{self.key[:10]}{ending}"

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def load(job: Job) -> dict[str, Any] | None:
    """The record of a run that has ended before, or None."""
    try:
        content = json.loads(job.file(".json").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TrlExtError(f"{job.file('.json')} is not a record of a run ({error}). Remove it.") from error
    return dict(content) if content.get("key") == job.key else None


def save(job: Job, content: Mapping[str, Any]) -> None:
    write(job.file(".json"), {"arm": job.arm, "seed": job.seed, "key": job.key, **content})


def crashed(job: Job, message: str) -> dict[str, Any]:
    """What stands in for the record of a run that has none."""
    content = {"status": "crashed", "error": message, "history": [], "completions": {}, "steps": 0, "seconds": 0.0}
    return {"arm": job.arm, "seed": job.seed, "key": job.key, **content}


def write(file: Path, content: Any) -> None:
    """Writes JSON so that the file is either there and whole or not there.

    Raises:
        UnwritableError: The disk is full, or the folder cannot be written.
    """
    write_file(file, json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def write_file(file: Path, content: str | bytes) -> None:
    """Writes a file of a comparison.

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


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become null, what it does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
