"""Observations of an environment as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from .player import installed

MOST_NUMBERS = 32
"""The longest array that has a text by default."""


def describe(space: Any) -> Callable[[Any], str]:
    """Returns the function that writes the observations of a space by default.

    - Discrete: the number.
    - Text: the text.
    - MultiDiscrete, MultiBinary and Box of up to 32 numbers: the numbers in brackets, with three significant digits.
    - Dict and Tuple: a line `name: text` for every part.

    Raises:
        ConfigError: The space has no text by default. The error says what to give instead.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return lambda observation: str(int(observation))
    if isinstance(space, installed("gymnasium").spaces.Text) or kind == "MissionSpace":
        return str
    if kind in ("MultiDiscrete", "MultiBinary", "Box") and _size(space) <= MOST_NUMBERS:
        return lambda observation: "[" + ", ".join(f"{number:.3g}" for number in observation.flatten().tolist()) + "]"
    if kind in ("Dict", "Tuple"):
        subspaces = dict(space.spaces) if kind == "Dict" else dict(enumerate(space.spaces))
        writers = {name: describe(subspace) for name, subspace in subspaces.items()}
        return lambda observation: "\n".join(f"{name}: {write(observation[name])}" for name, write in writers.items())
    raise ConfigError(
        f"observations are {space}, for which there is no text by default. Give `observe`, a function from an "
        f'observation to a text (for MiniGrid trl_ext.environments.minigrid_text), or render="image".'
    )


def _size(space: Any) -> int:
    """Returns how many numbers an array of a space has."""
    size = 1
    for length in space.shape:
        size *= int(length)
    return size


def minigrid_text(observation: Mapping[str, Any]) -> str:
    """Puts an observation of MiniGrid into words: the wall ahead, and every thing in view relative to the agent.

    In `wall 2 ahead, green goal 2 ahead 1 right`, a wall is two steps ahead, and the goal two steps ahead and one to
    the right. Other walls are left out.
    """
    constants = installed("minigrid.core.constants")
    view = observation["image"]
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
