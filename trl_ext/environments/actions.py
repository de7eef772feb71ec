"""Actions: from the text that a model writes to what the environment takes."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .player import Spaces, installed, what_raised

Actions = Mapping[str, Any] | Sequence[str] | Callable[[str], Any]


class ActionReaderFailure(Exception):
    """The function that reads actions raised something else than ValueError. The text says what."""


@dataclasses.dataclass(frozen=True)
class ActionReader:
    """Reads the argument of a tool call as an action.

    Attributes:
        read: Returns the action for a text, or raises ValueError with what is wrong.
        words: All texts that it takes, if they are few.
        form: What an action looks like, for the model.
    """

    read: Callable[[str], Any]
    words: tuple[str, ...]
    form: str


def action_reader(spaces: Spaces, actions: Actions | None) -> ActionReader:
    """Makes the reader of an environment.

    Args:
        spaces: The spaces of the environment.
        actions: A mapping of words to actions, which may leave actions out, a list with a word for every action of a
            Discrete space, or a function that reads a text. By default the environment's own names, numbers, or JSON.

    Raises:
        ConfigError: The actions do not fit the space, or the space needs a function.
    """
    space, kind = spaces.actions, type(spaces.actions).__name__
    if callable(actions):
        return ActionReader(_checked(actions, space), (), "one action")
    if isinstance(actions, Mapping):
        return _words(actions, space)
    if actions is not None:
        count = getattr(space, "n", None) if kind == "Discrete" else None
        if count != len(actions):
            raise ConfigError(
                f"`actions` is a list of {len(actions)} words, and the action space is {space}. A list names every "
                f"action of a Discrete space in order; a mapping of words to actions may leave some out."
            )
        return _words({word: space.start + index for index, word in enumerate(actions)}, space)
    if kind == "Discrete":
        numbers = {str(number): number for number in range(int(space.start), int(space.start + space.n))}
        return _words(spaces.names or numbers, space)
    if kind in ("Box", "MultiDiscrete", "MultiBinary"):
        number = "whole number" if _is_whole(space) else "number"
        form = f"a JSON list of {number}s of the shape {list(space.shape)}" if space.shape else f"a {number}"
        return ActionReader(_checked(functools.partial(_array, space), space), (), form)
    if kind == "Text":
        return ActionReader(_checked(str, space), (), f"a text of at most {space.max_length} characters")
    raise ConfigError(
        f"the action space is {space}, for which there is no text by default. Give `actions`: a mapping of words to "
        f"actions, or a function that turns a text into an action and raises ValueError where it cannot."
    )


def _is_whole(space: Any) -> bool:
    """Returns whether an array of a space holds whole numbers."""
    return bool(space.dtype.kind in "biu")


def _array(space: Any, text: str) -> Any:
    """Reads JSON as an array of the type of a space, which holds exactly the numbers of the text.

    Raises:
        ValueError: The text is something else, or its numbers do not fit the type.
    """
    numpy = installed("numpy")
    try:
        given = numpy.asarray(json.loads(text))
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    if given.dtype.kind not in "biuf":
        raise ValueError("these are not numbers")
    with numpy.errstate(invalid="ignore", over="ignore"):
        action = given.astype(space.dtype)
    if not numpy.isfinite(action).all():
        raise ValueError("the numbers must be finite")
    if _is_whole(space) and not numpy.array_equal(action, given):
        raise ValueError(f"the numbers must be whole and fit {space.dtype}")
    return action


def _words(named: Mapping[str, Any], space: Any) -> ActionReader:
    """Makes a reader of words. Case and blanks around them do not count."""
    action_of = {word.strip().casefold(): action for word, action in named.items()}
    if not action_of or len(action_of) != len(named):
        raise ConfigError(f"`actions` needs words that differ in more than case; got {list(named)}.")
    for word, action in action_of.items():
        if not space.contains(action):
            raise ConfigError(f"`actions` maps {word!r} to {action!r}, which is not in the action space {space}.")
    listed = ", ".join(named)

    def read(text: str) -> Any:
        try:
            return action_of[text.strip().casefold()]
        except KeyError:
            raise ValueError(f"{text!r} is none of {listed}") from None

    return ActionReader(read, tuple(named), f"one of {listed}")


def _checked(read: Callable[[str], Any], space: Any) -> Callable[[str], Any]:
    """Makes `read` refuse, with the text, what it cannot read or what is not in the space."""

    def checked(text: str) -> Any:
        try:
            action = read(text)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{text!r}: {error}") from error
        except (Exception, SystemExit) as error:  # a function of the user may raise anything
            raise ActionReaderFailure(f"`actions` raised {what_raised(error)} for {text!r}") from error
        if not space.contains(action):
            raise ValueError(f"{text!r} is not in {space}")
        return action

    return checked
