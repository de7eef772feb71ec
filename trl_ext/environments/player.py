"""Players of an environment of Gymnasium: what the adapter asks of them, and the one in the trainer's process."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..errors import ConfigError

_SUCCESS_KEYS = ("is_success", "success")
"""What environments call success in the `info` of a step."""


class EnvironmentFailure(Exception):
    """The environment raised, hung or died. The text says which."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an environment gives back after a reset or a step."""

    observation: Any
    picture: Any = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None


@dataclasses.dataclass(frozen=True)
class Spaces:
    """What is known of an environment before it is played.

    Attributes:
        actions: The action space.
        observations: The observation space.
        names: The environment's own names of its actions.
        max_steps: The environment's own limit of steps.
    """

    actions: Any
    observations: Any
    names: Mapping[str, Any]
    max_steps: int | None


class Player(Protocol):
    """Plays episodes, one after the other. Every method may raise `EnvironmentFailure`."""

    def spaces(self) -> Spaces:
        """Returns the spaces of the environment."""
        ...

    def reset(self, seed: int) -> Outcome:
        """Begins an episode, after a failure in a new environment."""
        ...

    def step(self, action: Any) -> Outcome:
        """Takes an action."""
        ...


class LocalPlayer:
    """Plays in this process. It is fast and catches exceptions, but waits for ever for an environment that hangs."""

    def __init__(self, make: Callable[[], Any], pictures: bool) -> None:
        self._make, self._pictures = make, pictures
        self._env: Any = None

    def spaces(self) -> Spaces:
        """Returns the spaces of the environment."""
        return self._try(lambda: read_spaces(self._environment()))

    def reset(self, seed: int) -> Outcome:
        """Begins an episode, after a failure in a new environment."""
        return self._try(lambda: reset(self._environment(), seed, self._pictures))

    def step(self, action: Any) -> Outcome:
        """Takes an action."""
        return self._try(lambda: step(self._environment(), action, self._pictures))

    def _environment(self) -> Any:
        if self._env is None:
            self._env = self._make()
        return self._env

    def _try(self, play: Callable[[], Any]) -> Any:
        try:
            return play()
        except Exception as error:  # an environment may raise anything
            self._env = None  # its state is unknown now
            raise as_failure(error) from error


def as_failure(error: Exception) -> EnvironmentFailure:
    """Turns an exception of an environment into a failure. Our own errors are told without their type."""
    return EnvironmentFailure(str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}")


def read_spaces(env: Any) -> Spaces:
    """Reads the spaces of an environment, its step limit, and the names of its actions if they are an enum."""
    actions = getattr(env.unwrapped, "actions", None)
    members: Mapping[str, Any] = actions.__members__ if isinstance(actions, enum.EnumMeta) else {}
    names = {name: member.value for name, member in members.items()}
    # MiniGrid keeps its limit on the environment itself
    max_steps = getattr(env.spec, "max_episode_steps", None) or getattr(env.unwrapped, "max_steps", None)
    return Spaces(env.action_space, env.observation_space, names, max_steps)


def reset(env: Any, seed: int, pictures: bool) -> Outcome:
    """Begins an episode from a seed."""
    observation, _ = env.reset(seed=seed)
    return Outcome(observation, render(env) if pictures else None)


def step(env: Any, action: Any, pictures: bool) -> Outcome:
    """Takes an action."""
    observation, reward, terminated, truncated, info = env.step(action)
    success = next((bool(info[key]) for key in _SUCCESS_KEYS if key in info), None)
    picture = render(env) if pictures else None
    return Outcome(observation, picture, float(reward), bool(terminated), bool(truncated), success)


def render(env: Any) -> Any:
    """Renders an environment as an array of height, width and three colours."""
    frame = env.render()
    if getattr(frame, "ndim", 0) != 3:
        raise ValueError(f'render() gave {type(frame).__name__}, not a picture; make it with render_mode="rgb_array"')
    return frame


def make(env: str, options: Mapping[str, Any]) -> Any:
    """Calls `gymnasium.make`.

    Raises:
        ConfigError: The environment cannot be made. The error says why.
    """
    gymnasium = installed("gymnasium")
    try:
        return gymnasium.make(env, disable_env_checker=True, **options)
    except Exception as error:  # of the registry, of the environment, of what it imports
        unknown = isinstance(error, gymnasium.error.UnregisteredEnv) and ":" not in env
        hint = " An environment of another package is written package:ID, as in minigrid:ID." if unknown else ""
        raise ConfigError(f"gymnasium.make({env!r}) failed: {type(error).__name__}: {error}{hint}") from error


def installed(package: str) -> Any:
    """Imports an optional package.

    Raises:
        ConfigError: It is not installed. The error says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(f'{package} is not installed: pip install "trl_ext[environments]"') from error
