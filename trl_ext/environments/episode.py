"""Episodes of an environment of Gymnasium, as TRL's GRPOTrainer plays them."""

from __future__ import annotations

import dataclasses
import logging
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ..errors import ConfigError
from .actions import ActionReader, ActionReaderFailure
from .observations import UnreadableObservation
from .player import EnvironmentFailure, Outcome, Player, what_raised

logger = logging.getLogger(__name__)

ToolResult = str | list[dict[str, Any]]
"""What a tool returns to TRL: a text, or blocks with an image."""


@dataclasses.dataclass(frozen=True)
class Game:
    """How an environment is played.

    Attributes:
        name: What it is called in prompts, warnings and errors.
        player: Makes a player.
        actions: Reads the actions of the model.
        observe: Turns an observation into a text. None for no text.
        picture: Turns a rendered frame into an image. None for no images.
        max_steps: Actions after which an episode is truncated.
        invalid_reward: The reward of an invalid action.
        over: What is said when the episode is over.
    """

    name: str
    player: Callable[[], Player]
    actions: ActionReader
    observe: Callable[[Any], str] | None
    picture: Callable[[Any], Any] | None
    max_steps: int | None
    invalid_reward: float
    over: str


class GymEnvironmentKind(type):
    """Methods of a class made by `gym`. As class methods, TRL below 1.15 would take them for tools."""

    _game: Game

    def rows(cls, size: int, first_seed: int = 0, prompt: str | None = None) -> list[dict[str, Any]]:
        """Makes rows for a data set, one episode each.

        Args:
            size: How many.
            first_seed: The seed of the first row. The others follow.
            prompt: What the model is told, followed by the first observation. By default how to act, in two lines.
        """
        content = cls.prompt() if prompt is None else prompt
        seeds = range(first_seed, first_seed + size)
        return [{"prompt": [{"role": "user", "content": content}], "seed": seed} for seed in seeds]

    def prompt(cls) -> str:
        """Returns what the model is told by default."""
        game = cls._game
        return (
            f"You play {game.name}. Call the tool `act` with one action at a time until the episode is over.\n"
            f"An action is {game.actions.form}.\n"
        )


class GymEnvironment(metaclass=GymEnvironmentKind):
    """Plays one episode after the other: `reset` begins one, the tool `act` takes an action.

    Subclasses are made by `gym`.

    Attributes:
        step_rewards: The reward of every action so far, invalid ones included.
        done: Whether the environment ended the episode.
        truncated: Whether a step limit ended it, or the environment failed.
        invalid_actions: How many actions were invalid.
        late_actions: How many actions came after the end of the episode. They count for nothing.
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
        """What the environment says in `info` (`is_success` or `success`), else whether it ended with a reward."""
        if self._success is not None:
            return self._success
        return self.done and self.step_rewards[-1] > 0

    def reset(self, **row: Any) -> ToolResult:
        """Begins an episode from the `seed` of a row. The same seed gives the same start."""
        seed = row.get("seed")
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(
                f"{self._game.name}: every row needs a whole number `seed`, from which all completions of a prompt "
                f"start; got {seed!r} in a row with {sorted(row)}. `rows()` of the environment makes such rows."
            )
        self._begin(seed)
        try:
            outcome = self._player.reset(seed)
        except EnvironmentFailure as first:
            logger.warning("%s: reset with seed %d failed (%s); trying once more.", self._game.name, seed, first)
            try:
                outcome = self._player.reset(seed)
            except EnvironmentFailure as error:
                raise RuntimeError(
                    f"{self._game.name}: reset with seed {seed} failed twice: {error}. Repair the environment, or "
                    f"leave out the row."
                ) from error
        try:
            image, text = self._present(outcome)
        except UnreadableObservation as error:
            raise RuntimeError(
                f"{self._game.name}: the observation after reset with seed {seed} cannot be shown: {error}"
            ) from error
        return self._result(image, text)

    def _act(self, *positional: Any, **named: Any) -> ToolResult:
        game = self._game
        if self.done or self.truncated:
            self.late_actions += 1
            return game.over
        try:
            action = game.actions.read(_argument(positional, named))
        except ActionReaderFailure as error:  # TRL would take it for a mistake of the model and go on
            return self._fail(str(error), 0.0)
        except ValueError as error:
            self.invalid_actions += 1
            self.step_rewards.append(game.invalid_reward)
            self._apply_limit()
            return self._with_ending(f"invalid action: {error}")
        try:
            outcome = self._player.step(action)
        except EnvironmentFailure as error:
            return self._fail(str(error), 0.0)
        if not math.isfinite(outcome.reward):
            return self._fail(f"the reward was {outcome.reward}", math.nan)
        try:
            image, text = self._present(outcome)
        except UnreadableObservation as error:  # TRL would take it for a mistake of the model and go on
            return self._fail(f"the observation cannot be shown: {error}", 0.0)
        self.step_rewards.append(outcome.reward)
        self.done, self.truncated = outcome.terminated, outcome.truncated and not outcome.terminated
        self._success = outcome.success
        self._apply_limit()
        return self._result(image, text)

    def _apply_limit(self) -> None:
        """Truncates an episode that has used up its steps."""
        limit = self._game.max_steps
        self.truncated |= not self.done and limit is not None and len(self.step_rewards) >= limit

    def _fail(self, reason: str, reward: float) -> ToolResult:
        """Ends the episode because the environment failed.

        If the tool raised instead, TRL would show the model an error message and go on with the rollout.
        """
        self.failure = reason
        self.truncated = True
        self.step_rewards.append(reward)
        step = len(self.step_rewards)
        logger.warning(
            "%s failed at step %d of the episode with seed %s: %s", self._game.name, step, self._seed, reason
        )
        return self._with_ending(f"the environment failed: {reason}")

    def _present(self, outcome: Outcome) -> tuple[Any, str]:
        """Turns an outcome into the image and the text that the model gets.

        Raises:
            UnreadableObservation: It cannot be turned into them. The text says why.
        """
        game = self._game
        try:
            image = None if game.picture is None else game.picture(outcome.picture)
            text = "" if game.observe is None else game.observe(outcome.observation)
        except UnreadableObservation:
            raise
        except (Exception, SystemExit) as error:  # a function of the user may raise anything
            raise UnreadableObservation(f"`observe` raised {what_raised(error)}") from error
        if not isinstance(text, str):
            raise UnreadableObservation(f"`observe` returned {reprlib.repr(text)}, expected a text")
        return image, text

    def _result(self, image: Any, text: str) -> ToolResult:
        """Makes the result of a tool from an image and a text."""
        text = self._with_ending(text)
        if image is None:
            return text
        block: dict[str, Any] = {"type": "image", "image": image}
        return [block, {"type": "text", "text": text}] if text else [block]

    def _with_ending(self, text: str) -> str:
        """Adds to a text that the episode is over, if it is."""
        ending = self._game.over if self.done or self.truncated else ""
        return "\n".join(line for line in (text, ending) if line)


def _argument(positional: tuple[Any, ...], named: Mapping[str, Any]) -> str:
    """Returns the one argument of a call of `act`."""
    given = [*positional, *named.values()]
    if len(given) != 1 or not set(named) <= {"action"}:
        raise ValueError(f"`act` takes one argument, `action`; got {sorted(named) or 'none'}")
    return given[0] if isinstance(given[0], str) else str(given[0])
