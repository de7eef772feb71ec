"""Observations as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from .player import installed

MOST_NUMBERS = 32
"""Arrays of more numbers have no text by default."""


def describe(space: Any) -> Callable[[Any], str]:
    """The default text of the observations of a space.

    Discrete: the number. Text: the text. MultiDiscrete, MultiBinary and Box with up to 32 numbers: the numbers with
    three significant digits, in brackets. Dict and Tuple: a line `name: text` for every part.

    Raises:
        ConfigError: There is none; says what to give instead.
    """
    kind = type(space).__name__
    if kind == "Discrete":
        return lambda observation: str(int(observation))
    if isinstance(space, installed("gymnasium").spaces.Text) or kind == "MissionSpace":
        return str
    if kind in ("MultiDiscrete", "MultiBinary", "Box") and _size(space) <= MOST_NUMBERS:
        return lambda observation: "[" + ", ".join(f"{number:.3g}" for number in observation.flatten().tolist()) + "]"
    if kind in ("Dict", "Tuple"):
        parts = dict(space.spaces) if kind == "Dict" else dict(enumerate(space.spaces))
        texts = {name: describe(part) for name, part in parts.items()}
        return lambda observation: "\n".join(f"{name}: {text(observation[name])}" for name, text in texts.items())
    raise ConfigError(
        f"observations are {space}, for which there is no text by default. Give `observe`, a function from an "
        f'observation to a text (for MiniGrid trl_ext.environments.minigrid_text), or render="image".'
    )


def _size(space: Any) -> int:
    size = 1
    for length in space.shape:
        size *= int(length)
    return size


def minigrid_text(observation: Mapping[str, Any]) -> str:
    """An observation of MiniGrid in words: what stands ahead, and every thing in view relative to the agent.

    `wall 2 ahead, green goal 2 ahead 1 right`: two steps ahead is a wall; to the goal it is two steps ahead and one to
    the right. The view is that of the agent, who looks up from the middle of its lower edge. Walls count only ahead.
    """
    constants = installed("minigrid.core.constants")
    view = observation["image"]
    width, height = view.shape[:2]
    middle = width // 2
    found = []
    for ahead in range(1, height):
        if _name(constants, view[middle, height - 1 - ahead]) == "wall":
            found.append(f"wall {ahead} ahead")
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
            found.append(" ".join(words))
    carried = view[middle, height - 1]
    if _name(constants, carried) not in ("empty", "unseen", "agent"):
        found.append(f"carrying {constants.IDX_TO_COLOR[int(carried[1])]} {_name(constants, carried)}")
    return ", ".join(found) or "nothing"


def _name(constants: Any, cell: Any) -> str:
    return constants.IDX_TO_OBJECT[int(cell[0])]
