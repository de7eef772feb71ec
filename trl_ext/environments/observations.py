"""Observations of an environment as text."""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from .player import installed

MOST_NUMBERS = 32
"""The longest array that has a text by default."""
_HELP = "Give `observe`, a function from an observation to a text."


class UnreadableObservation(ValueError):
    """An observation cannot be shown to the model. The text says why."""


def describe(space: Any) -> Callable[[Any], str]:
    """Returns the function that writes the observations of a space by default.

    It raises `UnreadableObservation` for an observation that does not fit the space.

    - Discrete: the number.
    - Text: the text.
    - MultiDiscrete, MultiBinary and Box of up to 32 numbers: the numbers in brackets, whole ones in full, others with
      three significant digits.
    - Dict and Tuple: a line `name: text` for every part.

    Raises:
        ConfigError: The space has no text by default. The error says what to give instead.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return functools.partial(_whole, space)
    if is_text(space):
        return functools.partial(_text, space)
    if kind in ("MultiDiscrete", "MultiBinary", "Box") and _size(space) <= MOST_NUMBERS:
        return functools.partial(_numbers, space)
    if kind in ("Dict", "Tuple"):
        subspaces = dict(space.spaces) if kind == "Dict" else dict(enumerate(space.spaces))
        return functools.partial(_lines, space, {name: describe(subspace) for name, subspace in subspaces.items()})
    raise ConfigError(
        f"observations are {space}, for which there is no text by default. Give `observe`, a function from an "
        f'observation to a text (for MiniGrid trl_ext.environments.minigrid_text), or render="image".'
    )


def describe_texts(space: Any) -> Callable[[Any], str] | None:
    """Returns the function that writes what a picture does not show: the observation's texts, such as a mission.

    None where the observations hold no text.
    """
    if is_text(space):
        return functools.partial(_text, space)
    if type(space).__name__ != "Dict":
        return None
    texts = {name: describe(subspace) for name, subspace in space.spaces.items() if is_text(subspace)}
    return functools.partial(_lines, space, texts) if texts else None


def is_text(space: Any) -> bool:
    """Returns whether a space holds texts."""
    kinds = {kind.__name__ for kind in type(space).__mro__}  # BabyAI's missions have a class of their own
    return isinstance(space, installed("gymnasium").spaces.Text) or "MissionSpace" in kinds


def _misfit(space: Any, observation: Any, problem: str) -> UnreadableObservation:
    """Returns the error for an observation that does not fit its space."""
    return UnreadableObservation(f"{reprlib.repr(observation)} {problem}, and the space is {space}. {_HELP}")


def _whole(space: Any, observation: Any) -> str:
    """Writes the observation of a Discrete space."""
    number = _array(space, observation)
    if number.size != 1 or not float(number.item()).is_integer():
        raise _misfit(space, observation, "is not a whole number")
    return str(int(number.item()))


def _text(space: Any, observation: Any) -> str:
    """Writes the observation of a space of texts."""
    if not isinstance(observation, str):
        raise _misfit(space, observation, "is not a text")
    return str(observation)


def _numbers(space: Any, observation: Any) -> str:
    """Writes numbers, whether the environment gives an array, a list or one number."""
    numbers = _array(space, observation).flatten().tolist()
    if len(numbers) != _size(space):
        raise _misfit(space, observation, f"has {len(numbers)} numbers")
    return "[" + ", ".join(str(int(n)) if isinstance(n, int) else f"{n:.3g}" for n in numbers) + "]"


def _array(space: Any, observation: Any) -> Any:
    """Returns an observation as an array of numbers."""
    try:
        # a tensor may need a gradient, of which an array knows nothing
        detached = observation.detach() if hasattr(observation, "detach") else observation
        array = installed("numpy").asarray(detached)
    except (ValueError, TypeError, RuntimeError) as error:
        raise _misfit(space, observation, f"is not an array ({error})") from error
    if array.dtype.kind not in "biuf":
        raise _misfit(space, observation, "does not hold numbers")
    return array


def _lines(space: Any, writers: Mapping[Any, Callable[[Any], str]], observation: Any) -> str:
    """Writes a line for every part of a Dict or a Tuple."""
    if type(space).__name__ == "Dict":
        if not isinstance(observation, Mapping):
            raise _misfit(space, observation, "is not a mapping")
        missing = [name for name in writers if name not in observation]
        if missing:
            raise UnreadableObservation(
                f"there is no {missing[0]!r}, which the space {space} declares; the parts are "
                f"{', '.join(map(repr, observation)) or 'none'}. {_HELP}"
            )
    elif not _has_parts(observation, len(writers)):
        raise _misfit(space, observation, f"does not have {len(writers)} parts")
    return "\n".join(f"{name}: {write(observation[name])}" for name, write in writers.items())


def _has_parts(observation: Any, count: int) -> bool:
    """Returns whether an observation is a sequence or an array of so many parts."""
    is_array = bool(getattr(observation, "shape", None))
    return (is_array or isinstance(observation, Sequence)) and len(observation) == count


def _size(space: Any) -> int:
    """Returns how many numbers an array of a space has."""
    size = 1
    for length in space.shape:
        size *= int(length)
    return size


def minigrid_text(observation: Mapping[str, Any]) -> str:
    """Puts an observation of MiniGrid into words: the mission, then on a new line what `minigrid_view` returns.

    The mission differs from seed to seed in many environments, so every observation has it.
    """
    view = minigrid_view(observation)
    if not isinstance(observation.get("mission"), str):
        raise UnreadableObservation(
            "minigrid_text needs an observation with a text 'mission'. Use minigrid_view if there is none."
        )
    return f"mission: {observation['mission']}\n{view}"


def minigrid_view(observation: Mapping[str, Any]) -> str:
    """Puts the view of MiniGrid into words: the wall ahead, and every thing in view relative to the agent.

    In `wall 2 ahead, green goal 2 ahead 1 right`, a wall is two steps ahead, and the goal two steps ahead and one to
    the right. Other walls are left out.
    """
    constants = installed("minigrid.core.constants")
    if not isinstance(observation, Mapping) or "image" not in observation:
        raise UnreadableObservation(
            "an observation of MiniGrid is a mapping with an 'image'. Give a function of your own."
        )
    view = observation["image"]
    _check_view(constants, view)
    width, height = view.shape[:2]  # the agent looks up from the middle of the lower edge
    middle = width // 2
    things = []
    for ahead in range(1, height):
        if _name(constants, view[middle, height - 1 - ahead]) == "wall":
            things.append(f"wall {ahead} ahead")
            break
    for ahead in range(height):
        for x in range(width):
            cell = view[x, height - 1 - ahead]
            name = _name(constants, cell)
            if name in ("unseen", "empty", "wall", "floor", "agent") or (x == middle and ahead == 0):
                continue
            words = [constants.IDX_TO_COLOR[int(cell[1])], name]
            if name == "door":
                words.insert(0, {0: "open", 1: "closed", 2: "locked"}[int(cell[2])])
            words += [str(ahead), "ahead"] if ahead else []
            words += [str(abs(x - middle)), "left" if x < middle else "right"] if x != middle else []
            things.append(" ".join(words))
    carried = view[middle, height - 1]
    if _name(constants, carried) not in ("empty", "unseen", "agent"):
        things.append(f"carrying {constants.IDX_TO_COLOR[int(carried[1])]} {_name(constants, carried)}")
    return ", ".join(things) or "nothing"


def _name(constants: Any, cell: Any) -> str:
    """Returns what MiniGrid calls the thing in a cell."""
    return constants.IDX_TO_OBJECT[int(cell[0])]


def _check_view(constants: Any, view: Any) -> None:
    """Refuses what is not the agent's own view, such as a picture or the whole grid."""
    numbers = installed("numpy").asarray(view)
    if numbers.ndim != 3 or numbers.shape[2] != 3 or not set(numbers[..., 0].flat) <= set(constants.IDX_TO_OBJECT):
        raise UnreadableObservation(
            "the 'image' is not MiniGrid's view of things, colours and states, but maybe a picture."
        )
    if (numbers[..., 0] == constants.OBJECT_TO_IDX["agent"]).any():
        raise UnreadableObservation(
            "the 'image' shows the agent, so it is the whole grid and not the agent's own view. Leave out the wrapper "
            "that shows the whole grid, or give a function of your own."
        )
