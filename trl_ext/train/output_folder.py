"""Output folder of a run: what is in it, and whether a run may write there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, counted
from ..plan import ownership
from ..trl_internals.arguments import resume_value
from .command_line import Request

RECORD, PICTURE = "trl_ext_run.json", "trl_ext_curves.png"
_WEIGHTS = ("model.safetensors*", "model-*.safetensors", "pytorch_model*.bin*", "adapter_model.*")
"""Names under which transformers and PEFT save a model. Other files of such types may be the user's."""


@dataclasses.dataclass(frozen=True)
class Contents:
    """What runs left in a folder.

    Attributes:
        record: The record of the last run, empty if there is none.
        checkpoints: Its checkpoints by step, complete or not.
        weights: Names of files with a saved model.
    """

    record: dict[str, Any]
    checkpoints: tuple[Path, ...]
    weights: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether a new run would replace something of value."""
        ended = bool(self.record) and self.record.get("status", "finished") == "finished"
        return bool(self.checkpoints or self.weights) or ended


def of(given: Mapping[str, Any]) -> Path:
    """Returns the output folder of a run with these settings."""
    return Path(str(given.get("output_dir") or "trainer_output")).expanduser()


def check(request: Request, given: Mapping[str, Any], folder: Path) -> None:
    """Refuses to resume from what does not exist, and to replace an older run that nobody wants to replace.

    Args:
        request: What the user asked for.
        given: The settings of TRL, those of the embedded default included.
        folder: The output folder.

    Raises:
        ConfigError: With what is in the folder, and what can be done.
    """
    resumes = resume_value(given.get("resume_from_checkpoint")) is not None
    if request.overwrite and resumes:
        raise ConfigError(
            "--overwrite replaces the run in output_dir, and --resume_from_checkpoint goes on with it. Leave one out."
        )
    if request.save_on_interrupt and not request.save:
        raise ConfigError("--save_on_interrupt saves a checkpoint, and --no_save saves nothing. Leave one out.")
    if request.save_on_interrupt and given.get("save_only_model"):
        raise ConfigError(
            "--save_on_interrupt saves a checkpoint to go on from, and save_only_model=True leaves out what that "
            "takes. Leave one out."
        )
    owner = ownership.owner(request.specs)
    if owner is not None:  # it also resumes the run, and looks into the folder itself
        for option, wanted in (("--overwrite", request.overwrite), ("--no_save", not request.save)):
            if wanted:
                raise ConfigError(
                    f"plugin {owner.name!r} keeps the models of its trainings in output_dir and cannot do without, so "
                    f"{option} has no meaning. Leave it out, or name another folder with --output_dir."
                )
        return
    if resumes:
        check_resume(folder, given)
    elif request.overwrite:
        check_outside(folder, given.get("model_name_or_path"))
    else:
        check_free(folder)


def check_resume(folder: Path, given: Mapping[str, Any]) -> None:
    """Refuses to resume from a checkpoint that does not exist.

    Args:
        folder: The output folder.
        given: The settings of TRL.

    Raises:
        ConfigError: There is no checkpoint.
    """
    from transformers.trainer_utils import get_last_checkpoint

    value = resume_value(given.get("resume_from_checkpoint"))
    if value is None:
        return
    output = str(folder)
    if value is True and not (os.path.isdir(output) and get_last_checkpoint(output)):
        raise ConfigError(
            f"there is no checkpoint to resume from in {output!r}. Set --output_dir to the folder of the run, name a "
            f"checkpoint with --resume_from_checkpoint PATH, or leave the option out to start anew."
        )
    if isinstance(value, str) and not os.path.isdir(value):
        raise ConfigError(f"--resume_from_checkpoint {value}: there is no such folder (looked in {Path.cwd()}).")


def contents(folder: Path) -> Contents:
    """Looks into a folder, which need not exist."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    weights = {file.name for pattern in _WEIGHTS for file in folder.glob(pattern)}
    return Contents(
        read_record(folder),
        tuple(sorted(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))),
        tuple(sorted(weights)),
    )


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the record of the last run in a folder, empty if there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def check_free(folder: Path) -> None:
    """Refuses a folder in which a new run would replace an older one.

    Raises:
        ConfigError: With what is in there.
    """
    found = contents(folder)
    if not found.finished:
        return
    raise ConfigError(
        f"the output folder {folder} holds {describe(found)}. A new run would replace it. Name another folder with "
        f"--output_dir, go on with that run by --resume_from_checkpoint true, or replace it with --overwrite."
    )


def describe(found: Contents) -> str:
    """Describes in words what runs left."""
    record, parts = found.record, []
    if record:
        plugins = " + ".join(plugin["name"] for plugin in record.get("plugins", ())) or "no plugin"
        steps = counted(record.get("steps", 0), "step")
        status = record.get("status", "finished")
        parts.append(f"a run of {steps} ({str(record.get('trainer')).upper()} with {plugins}, {status})")
    if found.weights:
        parts.append(f"a model ({found.weights[0]})")
    if found.checkpoints:
        names = [path.name for path in found.checkpoints]
        parts.append(names[0] if len(names) == 1 else f"{counted(len(names), 'checkpoint')} (the last is {names[-1]})")
    return " and ".join(parts)


def check_outside(folder: Path, model: Any) -> None:
    """Refuses to replace a folder from which the run itself takes its model.

    Raises:
        ConfigError: The model is in the folder.
    """
    if model is not None and Path(str(model)).exists() and Path(str(model)).resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"--overwrite would remove the model of this run, {model}, which is in the output folder {folder}. Name "
            f"another folder with --output_dir."
        )


def clear(folder: Path) -> None:
    """Removes what earlier runs left: checkpoints, model, record and picture. Other files stay."""
    found = contents(folder)
    for checkpoint in found.checkpoints:
        shutil.rmtree(checkpoint)
    for name in (*found.weights, RECORD, PICTURE):
        (folder / name).unlink(missing_ok=True)
