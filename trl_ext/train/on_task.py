"""A trainer, or the job of a plugin that owns its run, on a task of the lab instead of a named model and data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trl import get_peft_config

from trl_ext_hooks import TrainerKind

from .. import lab
from ..campaign.job import LocalJob
from ..errors import ConfigError
from ..trl_internals import arguments as trl_arguments
from ..trl_internals import seams

_FROM_THE_TASK = ("model_name_or_path", "dataset_name", "datasets", "reward_funcs", "reward_model_name_or_path")
"""Settings that a task decides."""


def build_trainer(
    task: str, kind: TrainerKind, parsed: trl_arguments.Parsed, sizes: Mapping[str, int], say: Callable[[str], None]
) -> Any:
    """Builds TRL's trainer with TRL's arguments on a task.

    Raises:
        ConfigError: The arguments name a model, data or rewards, which the task brings.
    """
    return seams.trainer_class(kind)(args=parsed[1], **_arguments(task, kind, parsed, sizes, say))


def build_job(
    task: str, parsed: trl_arguments.Parsed, sizes: Mapping[str, int], say: Callable[[str], None]
) -> LocalJob:
    """Builds the job of a plugin that owns its run, on the model and the training rows of a task.

    Raises:
        ConfigError: As `build_trainer`.
    """
    arguments = _arguments(task, "dpo", parsed, sizes, say)
    return LocalJob(arguments["model"], parsed[1], arguments["train_dataset"], arguments.get("peft_config"), None)


def _arguments(
    task: str, kind: TrainerKind, parsed: trl_arguments.Parsed, sizes: Mapping[str, int], say: Callable[[str], None]
) -> dict[str, Any]:
    """Returns what the constructor of a trainer takes besides its settings."""
    check_settings(task, parsed)
    arguments = lab.trainer_arguments(lab.task(task), kind, seed=parsed[1].seed, say=say, **sizes)
    adapter = get_peft_config(parsed[2])
    if adapter is not None:
        arguments["peft_config"] = adapter
    return arguments


def check_settings(task: str, parsed: trl_arguments.Parsed) -> None:
    """Refuses settings that name what the task brings.

    Raises:
        ConfigError: As `build_trainer`.
    """
    for group in parsed:
        for name in _FROM_THE_TASK:
            if getattr(group, name, None):
                raise ConfigError(
                    f"task {task!r} brings its own model, data and rewards, and the settings have "
                    f"{name}={getattr(group, name)!r}. Leave out one of them."
                )
