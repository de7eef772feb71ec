"""Runs that have ended elsewhere, as `compare` reads them: output folders of `trl_ext train` or of TRL itself."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError

RECORD, STATE = "trl_ext_run.json", "trainer_state.json"
"""What `trl_ext train` leaves in its output folder, and what transformers leaves in checkpoints."""
_FACTS = ("trainer", "model", "data", "processes", "device", "steps", "versions")
"""What runs are told apart by besides their plugins, as far as records hold it."""


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that has ended.

    Attributes:
        folder: Its output folder.
        history: Log entries as the trainer keeps them.
        steps: The last step.
        seed: The seed, or None where the folder does not say it.
        seconds: How long it took, or None.
        plugins: The plugins with their options. None where the folder does not say.
        facts: The other things by which runs may differ, with their values.
        remark: What is to be known about the numbers, such as that the run was interrupted.
    """

    folder: Path
    history: list[dict[str, Any]]
    steps: int
    seed: int | None = None
    seconds: float | None = None
    plugins: list[dict[str, Any]] | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    remark: str = ""


def arms(arguments: Sequence[str]) -> dict[str, list[FinishedRun]]:
    """Reads the runs of each arm.

    Args:
        arguments: Folders. A folder is that of a run, or holds the folders of several runs, which are then one arm.
            `NAME=FOLDER` names its arm, and several with one name are one arm.

    Raises:
        ConfigError: A folder holds no finished run, or there are not two arms.
    """
    named: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for argument in arguments:
        name, _, place = argument.partition("=")
        if name and place and not Path(argument).is_dir():
            named.setdefault(name, []).append(Path(place))
        else:
            unnamed.append(Path(argument))
    for name, folder in zip(_names(unnamed), unnamed, strict=True):
        named.setdefault(name, []).append(folder)
    found = {name: [run for folder in folders for run in _runs(folder)] for name, folders in named.items()}
    places = [run.folder.resolve() for runs in found.values() for run in runs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise ConfigError(f"the run {twice} is named twice, which would count it as two. Name every run once.")
    if len(found) < 2:
        raise ConfigError(
            f"a comparison of finished runs needs two arms, got {', '.join(found)}. Name the folders of two runs or "
            f"more, as in `trl_ext compare runs/plain runs/gdpo`, or the name of a recipe (`trl_ext recipes`)."
        )
    return found


def read(folder: Path) -> FinishedRun:
    """Reads a run from its output folder.

    Raises:
        ConfigError: There is no record of a run in it, or the record is damaged.
    """
    if (folder / RECORD).is_file():
        return _of_trl_ext(folder, _json(folder / RECORD))
    state = _state(folder)
    if state is None:
        raise ConfigError(
            f"{folder} holds no finished run: neither {RECORD}, which `trl_ext train` writes, nor {STATE}, which TRL "
            f"writes into checkpoints. Name the output folder of a run."
        )
    content = _json(state)
    history, steps = _history(state, content.get("log_history")), content.get("global_step", 0)
    remark = "" if state.parent == folder else f"read from {state.parent.name}, what came after it is not known"
    planned = content.get("max_steps") or steps
    if steps < planned:
        remark = f"{remark}{', ' * bool(remark)}step {steps} of {planned}"
    return FinishedRun(folder, history, steps, facts={"steps": steps}, remark=remark)


def _of_trl_ext(folder: Path, content: Mapping[str, Any]) -> FinishedRun:
    status = content.get("status", "finished")
    return FinishedRun(
        folder=folder,
        history=_history(folder / RECORD, content.get("history")),
        steps=content.get("steps", 0),
        seed=content.get("seed"),
        seconds=content.get("seconds"),
        plugins=content.get("plugins", []),
        facts={name: content[name] for name in _FACTS if content.get(name) is not None},
        remark="" if status == "finished" else f"{status} at step {content.get('steps', 0)}",
    )


def _runs(folder: Path) -> list[FinishedRun]:
    """Returns the run of a folder, or the runs in the folders inside it."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder (looked in {Path.cwd()}). Name output folders of runs.")
    if (folder / RECORD).is_file() or _state(folder) is not None:
        return [read(folder)]
    inside = [
        place for place in sorted(folder.iterdir()) if (place / RECORD).is_file() or (place.is_dir() and _state(place))
    ]
    return [read(place) for place in inside] or [read(folder)]


def _state(folder: Path) -> Path | None:
    """Returns the state of the trainer in a folder, or in the last of its checkpoints."""
    if (folder / STATE).is_file():
        return folder / STATE
    steps = {
        int(match[1]): place / STATE
        for place in folder.iterdir()
        if (match := re.fullmatch(r"checkpoint-(\d+)", place.name)) and (place / STATE).is_file()
    }
    return steps[max(steps)] if steps else None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not a record of a run ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a record of a run: expected an object, got {type(content).__name__}.")
    return content


def _history(file: Path, entries: Any) -> list[dict[str, Any]]:
    """Returns the log entries without values that are no numbers."""
    if not isinstance(entries, list) or not entries:
        raise ConfigError(
            f"{file} holds no log entries, so there is nothing to compare. The run may have ended too early."
        )
    return [
        {name: value for name, value in entry.items() if isinstance(value, int | float) and not isinstance(value, bool)}
        for entry in entries
    ]


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of paths that tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = [os.sep.join(place[-length:]) for place in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
