"""Arguments of TRL's trainers for a task: model, data, rewards and tools."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError
from . import pictures
from .definition import Row, Task
from .model import model_folder


def trainer_arguments(
    task: Task,
    kind: TrainerKind,
    *,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Returns all that a trainer needs besides settings: `GRPOTrainer(args=..., **trainer_arguments(task, "grpo"))`.

    Args:
        task: The task.
        kind: The trainer, one of `task.trainers`.
        seed: The seed of the rows. The model does not depend on it.
        train_size: Number of rows for training, by default `task.train_size`.
        test_size: Number of held-out rows, by default `task.test_size`. With 0 there is no `eval_dataset`.
        say: Called with lines for the user while the model is made.

    Returns:
        `model`, `train_dataset` and `eval_dataset`, as well as `processing_class` for a task with pictures,
        `reward_funcs` for GRPO and RLOO, and `tools` and `environment_factory` if the task has them.

    Raises:
        ConfigError: The task does not feed this trainer, or its model cannot be made.
    """
    arguments = arguments_without_model(task, kind, seed=seed, train_size=train_size, test_size=test_size)
    arguments["model"] = str(model_folder(task, say))
    if task.shape.picture:
        arguments["processing_class"] = pictures.processor_of(arguments["model"], task.shape)
    return arguments


def arguments_without_model(
    task: Task, kind: TrainerKind, *, seed: int = 0, train_size: int | None = None, test_size: int | None = None
) -> dict[str, Any]:
    """Returns the same without `model` and `processing_class`, which take time to make."""
    from datasets import Dataset

    if kind not in task.trainers:
        raise ConfigError(f"task {task.name!r} feeds {' and '.join(task.trainers)}, not {kind!r}.")
    splits = {
        "train_dataset": task.rows("train", task.train_size if train_size is None else train_size, seed),
        "eval_dataset": task.rows("test", task.test_size if test_size is None else test_size, seed),
    }
    arguments: dict[str, Any] = {}
    for name, rows in splits.items():
        _check(task, kind, rows)
        if rows:
            arguments[name] = Dataset.from_list(rows)
    if kind != "dpo":
        arguments["reward_funcs"] = [_logging(task, task.rewards[0]), *task.rewards[1:]]
    if task.tools:
        arguments["tools"] = list(task.tools)
    if task.environment is not None:
        arguments["environment_factory"] = task.environment
    return arguments


def _check(task: Task, kind: TrainerKind, rows: list[Row]) -> None:
    """Refuses rows that lack a column that the trainer needs."""
    needed = {"prompt", "chosen", "rejected"} if kind == "dpo" else {"prompt"}
    for number, row in enumerate(rows):
        if not needed <= set(row):
            raise task.broken(f"row {number} lacks {' and '.join(sorted(needed - set(row)))}; it has {sorted(row)}.")


def _logging(task: Task, reward: Callable[..., Sequence[float | None]]) -> Callable[..., Sequence[float | None]]:
    """Makes the reward also log the behaviour of completions, which TRL averages over rows and processes."""
    if task.behaviour is None:
        return reward
    behaviour = task.behaviour

    @functools.wraps(reward)
    def scored(*, log_metric: Callable[[str, float], None] | None = None, **columns: Any) -> Sequence[float | None]:
        if log_metric is not None:
            for name, values in behaviour(**columns).items():
                for value in values:
                    if value is not None:
                        log_metric(f"behaviour/{name}", float(value))
        return reward(**columns)

    return scored
