"""From an environment of Gymnasium to a class for TRL's `environment_factory`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from packaging.version import Version

from ..errors import ConfigError
from ..trl_internals import seams
from .actions import Actions, Reader, reader
from .observations import describe
from .player import Failed, Local, Player, Seen, installed, make
from .player_process import Worker

logger = logging.getLogger(__name__)

PICTURES = Version("1.15")
"""The first TRL whose tool loop keeps count of the images that tools return."""
Shown = str | list[dict[str, Any]]
"""What a tool returns to TRL: a text, or blocks with an image."""


@dataclasses.dataclass(frozen=True)
class Game:
    """How an environment is played: what `gym` was told and what it found out."""

    name: str
    player: Callable[[], Player]
    actions: Reader
    observe: Callable[[Any], str] | None
    picture: Callable[[Any], Any] | None
    max_steps: int | None
    invalid_reward: float
    over: str


class GymEnvironmentKind(type):
    """What a class made by `gym` can do itself. As class methods TRL below 1.15 would make tools of them."""

    _game: Game

    def rows(cls, size: int, first_seed: int = 0, prompt: str | None = None) -> list[dict[str, Any]]:
        """Rows for a data set, one episode each.

        Args:
            size: How many.
            first_seed: The seed of the first row; the others follow.
            prompt: What the model is told; TRL appends the first observation. By default how to act, in two lines.
        """
        content = cls.prompt() if prompt is None else prompt
        rows = range(first_seed, first_seed + size)
        return [{"prompt": [{"role": "user", "content": content}], "seed": seed} for seed in rows]

    def prompt(cls) -> str:
        """What the model is told by default."""
        game = cls._game
        return (
            f"You play {game.name}. Call the tool `act` with one action at a time until the episode is over.\n"
            f"An action is {game.actions.form}.\n"
        )


class GymEnvironment(metaclass=GymEnvironmentKind):
    """One episode after the other, as TRL's GRPOTrainer plays them: `reset` begins one, the tool `act` takes an action.

    Subclasses are made by `gym`.

    Attributes:
        step_rewards: The reward of every action so far, invalid ones included.
        done: The environment ended the episode.
        truncated: A step limit ended it, or the environment failed.
        invalid_actions: How many actions were none.
        late_actions: How many actions were tried when the episode was over; they count for nothing.
        failure: What broke the environment, else None.
    """

    _game: ClassVar[Game]

    def __init__(self) -> None:
        self._player = self._game.player()
        self._begin(None)

    def _begin(self, seed: int | None) -> None:
        self._seed = seed
        self.step_rewards: list[float] = []
        self.done = self.truncated = False
        self.invalid_actions = self.late_actions = 0
        self.failure: str | None = None
        self._success: bool | None = None

    @property
    def total_reward(self) -> float:
        """The sum of the rewards so far."""
        return float(sum(self.step_rewards))

    @property
    def success(self) -> bool:
        """What the environment says in `info` (`is_success` or `success`); else whether it ended with a reward."""
        if self._success is not None:
            return self._success
        return self.done and self.step_rewards[-1] > 0

    def reset(self, **row: Any) -> Shown:
        """Begins an episode from the `seed` of a row; the same row is the same start."""
        seed = row.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(
                f"{self._game.name}: every row needs a whole number `seed`, from which all completions of a prompt "
                f"start; got {seed!r} in a row with {sorted(row)}. `rows()` of the environment makes such rows."
            )
        self._begin(seed)
        try:
            seen = self._player.reset(seed)
        except Failed as first:
            logger.warning("%s: reset with seed %d failed (%s); trying once more.", self._game.name, seed, first)
            try:
                seen = self._player.reset(seed)
            except Failed as error:
                raise RuntimeError(
                    f"{self._game.name}: reset with seed {seed} failed twice: {error}. Repair the environment, or "
                    f"leave out the row."
                ) from error
        return self._shown(*self._drawn(seen))

    def _act(self, *unnamed: Any, **named: Any) -> Shown:
        game = self._game
        if self.done or self.truncated:
            self.late_actions += 1
            return game.over
        try:
            action = game.actions.read(_argument(unnamed, named))
        except ValueError as error:
            self.invalid_actions += 1
            self.step_rewards.append(game.invalid_reward)
            self._limit()
            return self._said(f"invalid action: {error}")
        try:
            seen = self._player.step(action)
        except Failed as error:
            return self._fail(str(error), 0.0)
        if not math.isfinite(seen.reward):
            return self._fail(f"the reward was {seen.reward}", math.nan)
        try:
            image, text = self._drawn(seen)
        except Exception as error:  # a function of the user, which TRL would take for a wrong call of the model
            return self._fail(f"`observe` raised {type(error).__name__}: {error}", 0.0)
        self.step_rewards.append(seen.reward)
        self.done, self.truncated = seen.terminated, seen.truncated and not seen.terminated
        self._success = seen.success
        self._limit()
        return self._shown(image, text)

    def _limit(self) -> None:
        most = self._game.max_steps
        self.truncated |= not self.done and most is not None and len(self.step_rewards) >= most

    def _fail(self, reason: str, reward: float) -> Shown:
        """Ends the episode. A tool that raised would be a mere error message to TRL, and the rollout would go on."""
        self.failure = reason
        self.truncated = True
        self.step_rewards.append(reward)
        step = len(self.step_rewards)
        logger.warning(
            "%s failed at step %d of the episode with seed %s: %s", self._game.name, step, self._seed, reason
        )
        return self._said(f"the environment failed: {reason}")

    def _drawn(self, seen: Seen) -> tuple[Any, str]:
        game = self._game
        image = None if game.picture is None else game.picture(seen.picture)
        return image, "" if game.observe is None else game.observe(seen.observation)

    def _shown(self, image: Any, text: str) -> Shown:
        said = self._said(text)
        if image is None:
            return said
        block: dict[str, Any] = {"type": "image", "image": image}
        return [block, {"type": "text", "text": said}] if said else [block]

    def _said(self, text: str) -> str:
        over = self._game.over if self.done or self.truncated else ""
        return "\n".join(part for part in (text, over) if part)


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
    """A class for TRL's `environment_factory` that plays an environment of Gymnasium.

    Args:
        env: The ID, `package:ID` where a package registers it, or a function that makes the environment.
        actions: Words for actions, or a function that reads one; see `actions.reader`. By default the environment's
            names, numbers, or JSON.
        observe: From an observation to a text, or the dotted path of such a function. By default see `text.describe`;
            with images no text.
        render: `"image"`: what the tool returns is the picture of `env.render()`, as an image.
        image_size: Width and height to which pictures are scaled. By default they stay as they are.
        max_steps: Actions after which an episode is truncated, invalid ones included. By default the environment's
            limit, if it has one.
        step_seconds: Seconds that a reset or a step may take. With a limit, every environment has a process of its
            own, which is stopped when it hangs and may crash; without one they run in the trainer's process, where
            exceptions are caught, and a hang or a crash of the interpreter is one of the run.
        invalid_reward: The reward of an action that is none.
        over: What is said when the episode is over.
        options: Go to `gymnasium.make`.

    Returns:
        A subclass of `GymEnvironment`; `rows` makes rows for it.

    Raises:
        ConfigError: The environment cannot be made, or has actions or observations without a text by default.
    """
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
        if not callable(env):
            options.setdefault("render_mode", "rgb_array")
    made: Callable[[], Any] = env if callable(env) else functools.partial(make, env, options)
    name = getattr(env, "__name__", "environment") if callable(env) else env.rpartition(":")[2]
    player: Callable[[], Player] = (
        functools.partial(Local, made, bool(render))
        if step_seconds is None
        else functools.partial(Worker, made, bool(render), step_seconds)
    )
    try:
        spaces = player().spaces()
    except Failed as error:
        raise ConfigError(f"{name}: {error}") from error
    if isinstance(observe, str):
        observe = _imported(observe)
    game = Game(
        name=name,
        player=player,
        actions=reader(spaces, actions),
        observe=observe or (None if render else describe(spaces.observations)),
        picture=functools.partial(_image, size=image_size) if render else None,
        max_steps=spaces.max_steps if max_steps is None else max_steps,
        invalid_reward=invalid_reward,
        over=over,
    )
    return type(_class_name(name), (GymEnvironment,), {"_game": game, "act": _tool(game), "__module__": __name__})


def _tool(game: Game) -> Callable[..., Shown]:
    """The method `act`: says that it takes one text, and takes anything, so that wrong arguments are a wrong action."""

    def act(self: GymEnvironment, *unnamed: Any, **named: Any) -> Shown:
        return self._act(*unnamed, **named)

    choices = f" (choices: {list(game.actions.words)})".replace("'", '"') if game.actions.words else ""
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


def _argument(unnamed: tuple[Any, ...], named: Mapping[str, Any]) -> str:
    given = [*unnamed, *named.values()]
    if len(given) != 1 or not set(named) <= {"action"}:
        raise ValueError(f"`act` takes one argument, `action`; got {sorted(named) or 'none'}")
    return given[0] if isinstance(given[0], str) else str(given[0])


def _image(frame: Any, size: int | None) -> Any:
    image = installed("PIL.Image").fromarray(frame)
    return image if size is None else image.resize((size, size))


def _class_name(name: str) -> str:
    """`MiniGrid-Empty-5x5-v0` -> `MiniGridEmpty5x5v0`."""
    return "".join(letter for letter in name if letter.isalnum()) or "Environment"


def _imported(path: str) -> Callable[[Any], str]:
    module, _, attribute = path.rpartition(".")
    try:
        found = getattr(installed(module), attribute)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"`observe`: there is no {path!r}.") from error
    if not callable(found):
        raise ConfigError(f"`observe`: {path} is {type(found).__name__}, not a function.")
    return found
