"""Names, weights and columns of a trainer's rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def reward_names(trainer: Any) -> tuple[str, ...]:
    return tuple(getattr(trainer, "reward_func_names", ()))


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


class RewardColumns:
    """Lets a round have other reward columns than the trainer has reward functions, and restores them after it."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.saved: dict[str, Any] = {}

    def use(self, names: Sequence[str], weights: torch.Tensor) -> None:
        if tuple(names) == reward_names(self.trainer) and torch.equal(weights, reward_weights(self.trainer)):
            return
        for attribute in ("reward_func_names", "reward_weights", "reward_funcs"):
            self.saved.setdefault(attribute, getattr(self.trainer, attribute))
        self.trainer.reward_func_names = list(names)
        self.trainer.reward_weights = weights
        self.trainer.reward_funcs = [None] * len(names)  # from here on TRL uses its length only

    def restore(self) -> None:
        for attribute, value in self.saved.items():
            setattr(self.trainer, attribute, value)
        self.saved.clear()
