"""Definition of a task: data, rewards, traces to warm a model up on, and the size of that model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError, near

Row = dict[str, Any]
"""A row of a data set, or a trace."""
Architecture = Literal["qwen3", "llama", "qwen2-vl"]


def _at_least_one(settings: Any, *names: str) -> None:
    """Refuses settings below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{type(settings).__name__}: `{name}` must be 1 or more; got {getattr(settings, name)}.")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a task's model, a causal language model made from a configuration of transformers.

    Attributes:
        architecture: `"qwen3"` or `"llama"`, or `"qwen2-vl"` for a task with pictures.
        width: Size of the hidden states, a multiple of twice the number of heads.
        layers: Number of layers.
        heads: Number of attention heads.
        feed_forward: Size of the inner layer of the feed-forward blocks.
        positions: The longest sequence that the model takes.
        picture: Width and height of pictures in pixels, 0 for a task without pictures.
        patch: Width and height of the part of a picture that is one token.
    """

    architecture: Architecture = "qwen3"
    width: int = 64
    layers: int = 2
    heads: int = 4
    feed_forward: int = 192
    positions: int = 256
    picture: int = 0
    patch: int = 8

    def __post_init__(self) -> None:
        _at_least_one(self, "width", "layers", "heads", "feed_forward", "positions", "patch")
        if self.architecture not in get_args(Architecture):
            raise ConfigError(
                f"Shape: `architecture` is {self.architecture!r}.{near(self.architecture, get_args(Architecture))}"
            )
        if self.width % (2 * self.heads):
            raise ConfigError(f"Shape: `width` ({self.width}) must be a multiple of twice `heads` ({self.heads}).")
        if (self.architecture == "qwen2-vl") != (self.picture > 0) or self.picture % self.patch:
            raise ConfigError(
                f"Shape: pictures are for `architecture` qwen2-vl, and their size is a multiple of `patch`; got "
                f"{self.architecture!r}, `picture` {self.picture} and `patch` {self.patch}."
            )


@dataclasses.dataclass(frozen=True)
class WarmUp:
    """Supervised training on a task's traces, before any reinforcement.

    Attributes:
        traces: How many traces are generated.
        steps: Optimiser steps. 0 leaves the model as it was initialised.
        batch_size: Traces per step.
        learning_rate: The highest learning rate. It rises over the first twentieth of the steps and then falls to a
            tenth.
        seed: The seed of the traces, of the initialisation and of the order.
    """

    traces: int = 4096
    steps: int = 600
    batch_size: int = 64
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one(self, "traces", "batch_size")
        if self.steps < 0 or self.learning_rate <= 0:
            raise ConfigError(
                f"WarmUp: `steps` ({self.steps}) must not be negative, and `learning_rate` "
                f"({self.learning_rate}) must be positive."
            )


@dataclasses.dataclass(frozen=True)
class Task:
    """A task that a small model can learn in minutes, with everything that a trainer of TRL needs.

    Attributes:
        name: Lower case, digits and hyphens.
        summary: What is asked and what there is to learn, in one line.
        trainers: The trainers that the task can feed. The first is the default.
        rows: From split, size and seed to rows of a data set, always the same: `prompt` as messages, columns for the
            rewards, and for DPO `chosen` and `rejected`.
        rewards: Reward functions as TRL calls them, each with a name of its own.
        traces: From size and seed to conversations to imitate: `prompt` and `completion` as messages. A message of
            the assistant may begin with a `prefix`, which is shown to the model and not learnt. Results of tools are
            not learnt either.
        tools: Functions that the model may call, with types and docstrings as transformers wants them.
        environment: Makes an environment for TRL's `environment_factory`: an object with `reset`, and with methods as
            tools.
        behaviour: Called like a reward. Returns named values per row, None where one does not apply, which are logged
            as `behaviour/NAME`.
        words: Texts that are one token each. Every printable ASCII character and the line break are tokens anyway.
        shape: The size of the model.
        warm_up: How the model is trained before the run.
        max_completion_length: Room for the completions of the warmed-up model, in tokens.
        train_size: Number of rows for training, by default.
        test_size: Number of held-out rows, by default.
    """

    name: str
    summary: str
    trainers: tuple[TrainerKind, ...]
    rows: Callable[[str, int, int], list[Row]]
    rewards: tuple[Callable[..., Sequence[float | None]], ...]
    traces: Callable[[int, int], list[Row]]
    tools: tuple[Callable[..., Any], ...] = ()
    environment: Callable[[], Any] | None = None
    behaviour: Callable[..., dict[str, list[float | None]]] | None = None
    words: tuple[str, ...] = ()
    shape: Shape = Shape()
    warm_up: WarmUp = WarmUp()
    max_completion_length: int = 32
    train_size: int = 1024
    test_size: int = 64

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", self.name):
            raise ConfigError(
                f"a task's name is lower-case words joined by hyphens, such as 'my-task'; got {self.name!r}."
            )
        known = get_args(TrainerKind)
        if not self.trainers or not set(self.trainers) <= set(known):
            raise self.broken(f"`trainers` must be a tuple with some of {', '.join(known)}; got {self.trainers!r}.")
        if not self.rewards and set(self.trainers) != {"dpo"}:
            raise self.broken("`rewards` is empty; GRPO and RLOO need at least one reward function.")
        names = [getattr(function, "__name__", "") for function in self.rewards]
        if len({*names, ""}) != len(names) + 1 or "<lambda>" in names:
            raise self.broken(f"every reward must be a function with a name of its own; got {names}.")
        if (self.tools or self.environment) and set(self.trainers) != {"grpo"}:
            raise self.broken(f"tools and environments work with GRPO only; `trainers` is {self.trainers!r}.")

    def broken(self, message: str) -> ConfigError:
        """Returns an error about the definition of this task."""
        return ConfigError(f"task {self.name!r}: {message}")
