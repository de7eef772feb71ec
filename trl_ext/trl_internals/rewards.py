"""Names, weights and columns of a trainer's rewards."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError
from .seams import trainer_class


def reward_names(trainer: Any) -> tuple[str, ...]:
    """The names of a trainer's reward functions, each of them once; see `distinct`."""
    return distinct(getattr(trainer, "reward_func_names", ()))


def distinct(names: Iterable[str]) -> tuple[str, ...]:
    """Numbers names that occur again: `match`, `match` become `match`, `match_2`.

    TRL names a `functools.partial` after its function and an object after its class. Under one name its metrics of two
    reward functions are mixed, and nobody can ask for the second one.
    """
    given = tuple(names)
    result: list[str] = []
    for name in given:
        unique, number = name, 1
        while unique in result or (number > 1 and unique in given):
            number += 1
            unique = f"{name}_{number}"
        result.append(unique)
    return tuple(result)


def reward_name(function: Any) -> str:
    """Returns the name under which TRL will report a reward function."""
    from trl.trainer.utils import get_callable_name, get_config_model_id

    if isinstance(function, str):
        return function.split("/")[-1]
    config: Any = getattr(function, "config", None)
    if isinstance(function, torch.nn.Module) and config is not None:
        return get_config_model_id(config).split("/")[-1]
    return get_callable_name(function)


ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What the trainer passes to every reward function, besides columns of the data."""
NOT_PASSED = ("prompt", "completion", "completion_ids")
"""Columns of the data that the trainer does not pass, since it passes its own values."""


def taken_twice(columns: Sequence[str]) -> str | None:
    """Returns a column that reward functions would get beside the trainer's own argument of that name, or None.

    Python refuses such a call, in the first round.
    """
    return next((name for name in columns if name in ("prompts", "completions")), None)


def calls_them(kind: TrainerKind, cls: type[Any], functions: Sequence[Any]) -> bool:
    """Tells whether a trainer class calls one of these rewards as TRL does, with the columns of the data."""
    if cls._calculate_rewards is not trainer_class(kind)._calculate_rewards:
        return False
    # a reward model, or the name of one, gets texts only
    return any(not isinstance(function, str | torch.nn.Module) for function in functions)


def check_columns(columns: Sequence[str]) -> None:
    """Refuses a column with the name of an argument of reward functions.

    Args:
        columns: The columns of the data that reach reward functions.

    Raises:
        ConfigError: With the column.
    """
    column = taken_twice(columns)
    if column is not None:
        raise ConfigError(
            f"the training data has a column {column!r}, and reward functions get an argument of that name from the "
            f"trainer. Rename the column."
        )


def of_trl(names: Sequence[str]) -> dict[str, Any]:
    """Returns the reward functions of TRL among the names that its scripts take, as the scripts use them."""
    import trl.rewards

    functions = {name: getattr(trl.rewards, name) for name in names if hasattr(trl.rewards, name)}
    if "get_soft_overlong_punishment" in functions:  # the scripts take what it returns
        functions["get_soft_overlong_punishment"] = trl.rewards.get_soft_overlong_punishment(1280, 256)
    return functions


def reward_weights(trainer: Any) -> torch.Tensor:
    return trainer.reward_weights.to(trainer.accelerator.device)


_COLUMNS = ("reward_func_names", "reward_weights", "reward_funcs")


@contextlib.contextmanager
def own_columns(trainer: Any) -> Iterator[dict[str, Any]]:
    """Gives the trainer its own reward columns, which it hands out, back after the block."""
    own = {name: getattr(trainer, name) for name in _COLUMNS}
    try:
        yield own
    finally:
        for name, value in own.items():
            if getattr(trainer, name) is not value:
                setattr(trainer, name, value)


@contextlib.contextmanager
def unlogged(trainer: Any, own: Mapping[str, Any]) -> Iterator[None]:
    """Drops what reward functions log in the block, in which the trainer has its own reward columns.

    Args:
        trainer: GRPO or RLOO.
        own: What `own_columns` handed out, for a round in which plugins may have changed the columns.
    """
    with own_columns(trainer):
        held = trainer._pending_extra_logs, trainer._pending_metrics
        for name, value in own.items():
            setattr(trainer, name, value)
        trainer._pending_extra_logs, trainer._pending_metrics = defaultdict(list), defaultdict(list)
        try:
            yield
        finally:
            trainer._pending_extra_logs, trainer._pending_metrics = held


def use_columns(trainer: Any, names: Sequence[str], weights: torch.Tensor) -> None:
    """Gives a round other reward columns than the trainer has reward functions. See `own_columns`."""
    if list(names) == list(trainer.reward_func_names) and torch.equal(weights, reward_weights(trainer)):
        return
    trainer.reward_func_names = list(names)
    trainer.reward_weights = weights
    trainer.reward_funcs = [None] * len(names)  # from here on TRL uses its length only
