"""Actions by default, by name and by function."""

from __future__ import annotations

import re
from typing import Any

import gymnasium
import numpy
import pytest

from trl_ext.environments import gym
from trl_ext.environments.actions import action_reader
from trl_ext.environments.player import Spaces

from .conftest import played


@pytest.mark.parametrize(
    ("space", "good", "action", "bad"),
    [
        (gymnasium.spaces.Discrete(3), "2", 2, "3"),
        (gymnasium.spaces.Discrete(2, start=5), "6", 6, "0"),
        (gymnasium.spaces.MultiBinary(2), "[1, 0]", [1, 0], "[1, 2]"),
        (gymnasium.spaces.MultiDiscrete([3, 2]), "[2, 1]", [2, 1], "[2]"),
        (gymnasium.spaces.Box(-1, 1, (2,)), "[0.5, -1]", [0.5, -1], "[0.5, 2]"),
        (gymnasium.spaces.Text(4), "abc", "abc", "abcde"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, gymnasium.Space) else "",
)
def test_actions_by_default(space: Any, good: str, action: Any, bad: str) -> None:
    read = action_reader(Spaces(space, None, {}, None), None).read
    assert numpy.array_equal(read(good), action)
    for text in (bad, "", "[1", "none"):
        if not space.contains(text):
            with pytest.raises(ValueError, match=re.escape(repr(text))):
                read(text)


def test_named_actions_and_functions() -> None:
    some = gym("FrozenLake-v1", actions={"east": 2, "south": 1}, is_slippery=False)
    assert played(some, "east", "EAST", "west").step_rewards == [0, 0, -0.1]
    opposite = gym("FrozenLake-v1", actions=lambda text: 3 - int(text), is_slippery=False)
    episode: Any = opposite()
    episode.reset(seed=0)
    assert episode.act("2") == "4" and episode.act("x").startswith("invalid action: 'x': invalid literal")
    assert episode.act("-1") == "invalid action: '-1' is not in Discrete(4)"
