"""Players of an environment of Gymnasium: what the adapter asks of them, and the one in the trainer's process."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import reprlib
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any, Protocol

from ..errors import ConfigError

_SUCCESS_KEYS = ("is_success", "success")
"""What environments call success in the `info` of a step."""


class EnvironmentFailure(Exception):
    """The environment raised, hung or died. The text says which."""


class WrongAnswer(ValueError):
    """The environment gave back something else than Gymnasium expects. The text says what."""


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
        name: What the environment is called: its ID, or else its class.
    """

    actions: Any
    observations: Any
    names: Mapping[str, Any]
    max_steps: int | None
    name: str = "environment"


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
        except (Exception, SystemExit) as error:  # an environment may raise anything
            self._env = None  # its state is unknown now
            raise as_failure(error) from error


def as_failure(error: Exception | SystemExit) -> EnvironmentFailure:
    """Turns an exception of an environment into a failure. Our own errors are told without their type."""
    return EnvironmentFailure(str(error) if isinstance(error, ConfigError | WrongAnswer) else what_raised(error))


def what_raised(error: BaseException) -> str:
    """Returns an exception of foreign code as a text."""
    if isinstance(error, SystemExit):
        return f"SystemExit: it called sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error}"


def read_spaces(env: Any) -> Spaces:
    """Reads the spaces of an environment, its step limit, and the names of its actions if they are an enum."""
    actions = getattr(env.unwrapped, "actions", None)
    members: Mapping[str, Any] = actions.__members__ if isinstance(actions, enum.EnumMeta) else {}
    names = {name: member.value for name, member in members.items()}
    # MiniGrid keeps its limit on the environment itself
    max_steps = getattr(env.spec, "max_episode_steps", None) or getattr(env.unwrapped, "max_steps", None)
    name = getattr(env.spec, "id", None) or type(env.unwrapped).__name__
    return Spaces(env.action_space, env.observation_space, names, max_steps, name)


def reset(env: Any, seed: int, pictures: bool) -> Outcome:
    """Begins an episode from a seed."""
    observation, _ = _parts(env.reset(seed=seed), "reset", "observation, info")
    return Outcome(observation, render(env) if pictures else None)


def step(env: Any, action: Any, pictures: bool) -> Outcome:
    """Takes an action."""
    parts = _parts(env.step(action), "step", "observation, reward, terminated, truncated, info")
    observation, reward, terminated, truncated, info = parts
    success = next((bool(_one(info[key], key)) for key in _SUCCESS_KEYS if info.get(key) is not None), None)
    picture = render(env) if pictures else None
    ends = [bool(_one(value, name)) for value, name in ((terminated, "terminated"), (truncated, "truncated"))]
    return Outcome(observation, picture, _one(reward, "reward"), ends[0], ends[1], success)


def _parts(answer: Any, method: str, expected: str) -> Sequence[Any]:
    """Returns what a method gave back, if that has as many parts as Gymnasium expects, the last one a mapping."""
    count = expected.count(",") + 1
    if not isinstance(answer, tuple | list) or len(answer) != count or not isinstance(answer[-1], Mapping):
        size = f" of {len(answer)}" if isinstance(answer, Sized) else ""
        raise WrongAnswer(
            f"`{method}` returned {type(answer).__name__}{size}, expected the {count} values {expected} of Gymnasium, "
            f"with a mapping as `info`"
        )
    return answer


def _one(value: Any, name: str) -> float:
    """Returns the one number or truth value that the environment gave, maybe in an array."""
    problem = f"`{name}` was {reprlib.repr(value)}, expected one number"
    try:
        # arrays and tensors of any library have `item`, which fails unless they hold one number
        number = value.item() if hasattr(value, "item") else installed("numpy").asarray(value).item()
        if not isinstance(number, str | bytes):
            return float(number)
    except (ValueError, TypeError, RuntimeError) as error:
        raise WrongAnswer(problem) from error
    raise WrongAnswer(problem)


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
