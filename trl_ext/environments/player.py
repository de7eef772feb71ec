"""An environment of Gymnasium as the adapter sees it. Runs in the trainer's process or in one of its own."""

from __future__ import annotations

import dataclasses
import enum
import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from ..errors import ConfigError

_SUCCESS = ("is_success", "success")
"""What environments call it in the `info` of a step."""


class Failed(Exception):
    """The environment raised, hung or died; the text says which."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What an environment gives back after a reset or a step."""

    observation: Any
    picture: Any = None
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None


@dataclasses.dataclass(frozen=True)
class Spaces:
    """What is known of an environment before it is played."""

    actions: Any
    observations: Any
    names: Mapping[str, Any]
    max_steps: int | None


class Player(Protocol):
    """Something that plays episodes, one after the other; every method may raise `Failed`."""

    def spaces(self) -> Spaces:
        """The spaces of the environment."""
        ...

    def reset(self, seed: int) -> Seen:
        """Begins an episode; after a failure in a new environment."""
        ...

    def step(self, action: Any) -> Seen:
        """Takes an action."""
        ...


class Local:
    """Plays in this process: fast, catches exceptions, and waits for ever for an environment that hangs."""

    def __init__(self, make: Callable[[], Any], pictures: bool) -> None:
        self._make, self._pictures = make, pictures
        self._env: Any = None

    def spaces(self) -> Spaces:
        return self._try(lambda: spaces_of(self._made()))

    def reset(self, seed: int) -> Seen:
        return self._try(lambda: reset(self._made(), seed, self._pictures))

    def step(self, action: Any) -> Seen:
        return self._try(lambda: step(self._made(), action, self._pictures))

    def _made(self) -> Any:
        if self._env is None:
            self._env = self._make()
        return self._env

    def _try(self, part: Callable[[], Any]) -> Any:
        try:
            return part()
        except Exception as error:  # an environment may raise anything
            self._env = None  # what it is in now is anybody's guess
            raise failed(error) from error


def failed(error: Exception) -> Failed:
    """What an exception of an environment is to the adapter; our own errors say enough without their type."""
    return Failed(str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}")


def spaces_of(env: Any) -> Spaces:
    """Reads the spaces, the names of the actions where the environment has them as an enum, and its step limit."""
    names = getattr(env.unwrapped, "actions", None)
    members: Mapping[str, Any] = names.__members__ if isinstance(names, enum.EnumMeta) else {}
    known = {name: member.value for name, member in members.items()}
    most = getattr(env.spec, "max_episode_steps", None) or getattr(env.unwrapped, "max_steps", None)  # MiniGrid's own
    return Spaces(env.action_space, env.observation_space, known, most)


def reset(env: Any, seed: int, pictures: bool) -> Seen:
    """Begins an episode from a seed."""
    observation, _ = env.reset(seed=seed)
    return Seen(observation, picture(env) if pictures else None)


def step(env: Any, action: Any, pictures: bool) -> Seen:
    """Takes an action."""
    observation, reward, terminated, truncated, info = env.step(action)
    said = next((bool(info[name]) for name in _SUCCESS if name in info), None)
    drawn = picture(env) if pictures else None
    return Seen(observation, drawn, float(reward), bool(terminated), bool(truncated), said)


def picture(env: Any) -> Any:
    """What the environment looks like, as an array of height, width and three colours."""
    drawn = env.render()
    if getattr(drawn, "ndim", 0) != 3:
        raise ValueError(f'render() gave {type(drawn).__name__}, not a picture; make it with render_mode="rgb_array"')
    return drawn


def make(env: str, options: Mapping[str, Any]) -> Any:
    """`gymnasium.make`, with an error for people."""
    gymnasium = installed("gymnasium")
    try:
        return gymnasium.make(env, disable_env_checker=True, **options)
    except Exception as error:  # of the registry, of the environment, of what it imports
        unknown = isinstance(error, gymnasium.error.UnregisteredEnv) and ":" not in env
        hint = " An environment of another package is written package:ID, as in minigrid:ID." if unknown else ""
        raise ConfigError(f"gymnasium.make({env!r}) failed: {type(error).__name__}: {error}{hint}") from error


def installed(package: str) -> Any:
    """Imports an optional package."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(f'{package} is not installed: pip install "trl_ext[environments]"') from error
