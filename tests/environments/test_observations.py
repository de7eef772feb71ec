"""Observations as text."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy
import pytest

from trl_ext import ConfigError
from trl_ext.environments import gym, minigrid_text
from trl_ext.environments.observations import describe


def test_observations_by_default() -> None:
    spaces = gymnasium.spaces
    assert describe(spaces.Discrete(3))(numpy.int64(2)) == "2"
    assert describe(spaces.Text(9))("hello") == "hello"
    assert describe(spaces.Box(-1, 1, (2, 2)))(numpy.array([[1, 0.12345], [-1e-9, 0]])) == "[1, 0.123, -1e-09, 0]"
    both = describe(spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple((spaces.MultiBinary(2),))))
    assert both({"a": 1, "b": (numpy.array([1, 0]),)}) == "a: 1\nb: 0: [1, 0]"
    with pytest.raises(ConfigError, match="no text by default"):
        describe(spaces.Box(0, 1, (33,)))


def test_minigrid_in_words() -> None:
    kind = gym("minigrid:MiniGrid-Empty-5x5-v0", observe=minigrid_text)
    assert "one of left, right, forward, pickup, drop, toggle, done" in kind.prompt()
    episode: Any = kind()
    assert episode.reset(seed=0) == "wall 3 ahead, green goal 2 ahead 2 right"
    seen = [episode.act(move) for move in ["right", "forward", "forward", "left"]]
    assert seen[0] == "wall 3 ahead, green goal 2 ahead 2 left"
    assert seen[2:] == ["wall 1 ahead, green goal 2 left", "wall 3 ahead, green goal 2 ahead"]
    episode.act("forward")
    assert episode.act("forward") == "wall 1 ahead\nThe episode is over."
    assert episode.success and episode.total_reward == pytest.approx(1 - 0.9 * 6 / 100)


def test_minigrid_with_doors_and_keys() -> None:
    episode: Any = gym("minigrid:MiniGrid-DoorKey-5x5-v0", observe=minigrid_text)()
    env = gymnasium.make("minigrid:MiniGrid-DoorKey-5x5-v0").unwrapped
    env.reset(seed=1)
    assert "locked yellow door" in episode.reset(seed=1) or "yellow key" in minigrid_text(env.gen_obs())
    from minigrid.core.world_object import Key

    env.carrying = Key("yellow")
    assert "carrying yellow key" in minigrid_text(env.gen_obs())
