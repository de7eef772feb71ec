"""Names, weights and columns of a trainer's rewards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


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
    """The name under which TRL reports a reward function, before the trainer is built."""
    from trl.trainer.utils import get_callable_name, get_config_model_id

    if isinstance(function, str):
        return function.split("/")[-1]
    config: Any = getattr(function, "config", None)
    if isinstance(function, torch.nn.Module) and config is not None:
        return get_config_model_id(config).split("/")[-1]
    return get_callable_name(function)


def reward_weights(trainer: Any) -> torch.Tensor:
    return trainer.reward_weights.to(trainer.accelerator.device)


_COLUMNS = ("reward_func_names", "reward_weights", "reward_funcs")


@contextlib.contextmanager
def own_columns(trainer: Any) -> Iterator[None]:
    """Gives the trainer its own reward columns back after the block."""
    own = {name: getattr(trainer, name) for name in _COLUMNS}
    try:
        yield
    finally:
        for name, value in own.items():
            if getattr(trainer, name) is not value:
                setattr(trainer, name, value)


def use_columns(trainer: Any, names: Sequence[str], weights: torch.Tensor) -> None:
    """Lets a round have other reward columns than the trainer has reward functions; see `own_columns`."""
    if list(names) == list(trainer.reward_func_names) and torch.equal(weights, reward_weights(trainer)):
        return
    trainer.reward_func_names = list(names)
    trainer.reward_weights = weights
    trainer.reward_funcs = [None] * len(names)  # from here on TRL uses its length only
