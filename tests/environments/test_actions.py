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


@pytest.mark.parametrize(
    ("space", "bad", "reason"),
    [
        (gymnasium.spaces.MultiDiscrete([2, 3]), "[0.9, 1.9]", "must be whole and fit int64"),
        (gymnasium.spaces.MultiBinary(2), "[0.5, 1]", "must be whole and"),
        (gymnasium.spaces.Box(0, 5, (2,), numpy.int32), "[0.5, 1]", "must be whole and"),
        (gymnasium.spaces.Box(0, 255, (1,), numpy.uint8), "[-1]", "must be whole and"),
        (gymnasium.spaces.Box(0, 255, (1,), numpy.uint8), "[300]", "must be whole and"),
        (gymnasium.spaces.Box(-numpy.inf, numpy.inf, (1,)), "[Infinity]", "must be finite"),
        (gymnasium.spaces.Box(-numpy.inf, numpy.inf, (1,)), "[1e300]", "must be finite"),
        (gymnasium.spaces.MultiDiscrete([2, 3]), "[NaN, 1]", "must be finite|must be whole"),
        (gymnasium.spaces.MultiDiscrete([2, 3]), '["0", "1"]', "not numbers"),
        (gymnasium.spaces.Box(-1, 1, (1,)), "[" * 100_000, "nested too deeply"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_numbers_that_do_not_fit_are_invalid_actions(space: Any, bad: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        action_reader(Spaces(space, None, {}, None), None).read(bad)


def test_whole_numbers_may_be_written_with_a_point() -> None:
    action = action_reader(Spaces(gymnasium.spaces.MultiDiscrete([2, 3]), None, {}, None), None).read("[1.0, 2.0]")
    assert action.tolist() == [1, 2] and action.dtype == numpy.int64


def test_a_function_for_actions_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """TRL would take it for a wrong call of the model and go on, and the action would cost nothing."""
    episode = played(gym("FrozenLake-v1", actions={"left": 0}.__getitem__), "right")
    assert episode.failure == "`actions` raised KeyError: 'right' for 'right'" and episode.truncated
    assert "FrozenLake-v1 failed at step 1" in caplog.text
