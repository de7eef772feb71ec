"""Adapter from an environment of Gymnasium to a class for TRL's `environment_factory`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from packaging.version import Version

from ..errors import ConfigError
from ..trl_internals import seams
from .actions import Actions, action_reader
from .episode import Game, GymEnvironment, ToolResult
from .observations import describe, describe_texts
from .player import EnvironmentFailure, LocalPlayer, Player, installed, make
from .player_process import PlayerProcess

PICTURES = Version("1.15")
"""The first TRL whose tool loop keeps count of the images that tools return."""


def gym(
    env: str | Callable[[], Any],
    *,
    actions: Actions | None = None,
    observe: Callable[[Any], str] | str | None = None,
    render: Literal["image"] | None = None,
    image_size: int | None = None,
    max_steps: int | None = None,
    step_seconds: float | None = None,
    invalid_reward: float = -0.1,
    over: str = "The episode is over.",
    **options: Any,
) -> type[GymEnvironment]:
    """Makes a class for TRL's `environment_factory` that plays an environment of Gymnasium.

    Args:
        env: The ID, `package:ID` if another package registers it, or a function that makes the environment.
        actions: Words for actions, or a function that reads one, as `actions.action_reader` takes them. By
            default the environment's names, numbers, or JSON.
        observe: A function from an observation to a text, or its dotted path. By default what
            `observations.describe` returns. If there are images, only the texts of the observation, such as a mission.
        render: `"image"` if the tool returns what `env.render()` draws, as an image.
        image_size: Width and height to which pictures are scaled. By default they stay as they are.
        max_steps: Actions after which an episode is truncated, invalid ones included. By default the environment's
            limit, if it has one.
        step_seconds: Seconds that a reset or a step may take. With a limit, every environment has a process of its
            own, which is stopped when it hangs and may crash. Without one, environments run in the trainer's process:
            exceptions are caught, but the run hangs or crashes with them.
        invalid_reward: The reward of an invalid action.
        over: What is said when the episode is over.
        options: Passed to `gymnasium.make`.

    Returns:
        A subclass of `GymEnvironment`, whose `rows` makes rows for it.

    Raises:
        ConfigError: The environment cannot be made, or its actions or observations have no text by default.
    """
    _check_settings(env, render, max_steps, step_seconds, options)
    if render and not callable(env):
        options.setdefault("render_mode", "rgb_array")
    make_env: Callable[[], Any] = env if callable(env) else functools.partial(make, env, options)
    named = getattr(env, "__name__", "<lambda>") if callable(env) else env.rpartition(":")[2]
    name = "environment" if named == "<lambda>" else named
    player: Callable[[], Player] = (
        functools.partial(LocalPlayer, make_env, bool(render))
        if step_seconds is None
        else functools.partial(PlayerProcess, make_env, bool(render), step_seconds)
    )
    try:
        spaces = player().spaces()
    except EnvironmentFailure as error:
        raise ConfigError(f"{name}: {error}") from error
    if named == "<lambda>":
        name = spaces.name
    if isinstance(observe, str):
        observe = _imported(observe)
    try:
        reader = action_reader(spaces, actions)
        observe = observe or (describe_texts if render else describe)(spaces.observations)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    game = Game(
        name=name,
        player=player,
        actions=reader,
        observe=observe,
        picture=functools.partial(_image, size=image_size) if render else None,
        max_steps=spaces.max_steps if max_steps is None else max_steps,
        invalid_reward=invalid_reward,
        over=over,
    )
    return type(_class_name(name), (GymEnvironment,), {"_game": game, "act": _tool(game), "__module__": __name__})


def _check_settings(
    env: str | Callable[[], Any],
    render: str | None,
    max_steps: int | None,
    step_seconds: float | None,
    options: dict[str, Any],
) -> None:
    """Refuses arguments of `gym` that cannot work."""
    if step_seconds is not None and step_seconds <= 0:
        raise ConfigError(f"`step_seconds` must be positive; got {step_seconds}.")
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"`max_steps` must be 1 or more; got {max_steps}.")
    if render not in (None, "image"):
        raise ConfigError(f'`render` is "image" or nothing; got {render!r}.')
    if callable(env) and options:
        raise ConfigError(f"{sorted(options)} would go to gymnasium.make, but `env` is a function.")
    if render:
        installed("PIL.Image")
        if seams.trl_version() < PICTURES:
            raise ConfigError(
                f"pictures need TRL {PICTURES} or later; the tool loop of {seams.trl_version()} loses count of them. "
                f"Upgrade (pip install --upgrade trl), or turn observations into text with `observe`."
            )


def _tool(game: Game) -> Callable[..., ToolResult]:
    """Makes the method `act`. Its schema has one text, but it takes anything: a wrong call is a wrong action."""

    def act(self: GymEnvironment, *positional: Any, **named: Any) -> ToolResult:
        return self._act(*positional, **named)

    choices = f" (choices: {list(game.actions.words)})".replace("'", '"') if game.actions.words else ""
    # transformers makes the schema of a tool from its docstring and signature
    act.__doc__ = f"""Takes an action in {game.name}.

    Args:
        action: The action, {game.actions.form}{choices}

    Returns:
        What is seen then, or that the episode is over
    """
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    act.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", kind), inspect.Parameter("action", kind, annotation=str)], return_annotation=str
    )
    act.__annotations__ = {"action": str, "return": str}
    return act


def _image(frame: Any, size: int | None) -> Any:
    image = installed("PIL.Image").fromarray(frame)
    return image if size is None else image.resize((size, size))


def _class_name(name: str) -> str:
    """Makes a name for a class: `MiniGrid-Empty-5x5-v0` -> `MiniGridEmpty5x5v0`."""
    return "".join(letter for letter in name if letter.isalnum()) or "Environment"


def _imported(path: str) -> Callable[[Any], str]:
    """Imports the function for observations."""
    module, _, attribute = path.rpartition(".")
    try:
        function = getattr(installed(module), attribute)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"`observe`: there is no {path!r}.") from error
    if not callable(function):
        raise ConfigError(f"`observe`: {path} is {type(function).__name__}, not a function.")
    return function
