"""Observations as text."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy
import pytest
import torch

from trl_ext import ConfigError
from trl_ext.environments import gym, minigrid_text, minigrid_view
from trl_ext.environments.observations import UnreadableObservation, describe


def test_observations_by_default() -> None:
    spaces = gymnasium.spaces
    assert describe(spaces.Discrete(3))(numpy.int64(2)) == "2"
    assert describe(spaces.Text(9))("hello") == "hello"
    assert describe(spaces.Box(-1, 1, (2, 2)))(numpy.array([[1, 0.12345], [-1e-9, 0]])) == "[1, 0.123, -1e-09, 0]"
    both = describe(spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple((spaces.MultiBinary(2),))))
    assert both({"a": 1, "b": (numpy.array([1, 0]),)}) == "a: 1\nb: 0: [1, 0]"
    with pytest.raises(ConfigError, match="no text by default"):
        describe(spaces.Box(0, 1, (33,)))


def test_observations_that_are_not_arrays() -> None:
    spaces = gymnasium.spaces
    box = describe(spaces.Box(-1, 1, (2,)))
    assert (
        box([0.1, 0.25])
        == box((0.1, 0.25))
        == box(torch.tensor([0.1, 0.25], requires_grad=True))
        == box(numpy.array([0.1, 0.25]))
        == "[0.1, 0.25]"
    )
    assert describe(spaces.Box(0, 1, ()))(0.5) == "[0.5]"
    assert describe(spaces.MultiDiscrete([9000, 2]))([1234, 1]) == "[1234, 1]", "whole numbers are not rounded"
    assert describe(spaces.Tuple([spaces.Discrete(3)] * 2))(numpy.array([2, 1])) == "0: 2\n1: 1"
    assert describe(spaces.Discrete(3))(numpy.array([2])) == describe(spaces.Discrete(3))(2.0) == "2"


@pytest.mark.parametrize(
    ("space", "observation", "reason"),
    [
        (gymnasium.spaces.Box(-1, 1, (2,)), None, r"None does not hold numbers.*Box.*`observe`"),
        (gymnasium.spaces.Box(-1, 1, (2,)), [0.1, "b"], r"'b'\] does not hold numbers"),
        (gymnasium.spaces.Box(-1, 1, (2,)), [[1], [1, 2]], r"is not an array .*, and the space is Box"),
        (gymnasium.spaces.Box(-1, 1, (2,)), [0.5], r"\[0\.5\] has 1 numbers, and the space is Box"),
        (gymnasium.spaces.Discrete(3), 1.5, r"1\.5 is not a whole number, and the space is Discrete\(3\)"),
        (gymnasium.spaces.Discrete(3), float("nan"), r"nan is not a whole number"),
        (gymnasium.spaces.Text(3), None, r"None is not a text"),
        (gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(2)), {"c": 1}, r"no 'a', which the space.*parts are 'c'"),
        (gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(2)), [1], r"\[1\] is not a mapping"),
        (gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)] * 2), (1,), r"does not have 2 parts"),
        (gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)]), (1, 1), r"does not have 1 parts"),
    ],
    ids=str,
)
def test_observations_that_do_not_fit_their_space(space: Any, observation: Any, reason: str) -> None:
    with pytest.raises(UnreadableObservation, match=reason):
        describe(space)(observation)


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("name", ["BabyAI-GoToObj-v0", "MiniGrid-Fetch-5x5-N2-v0"])
@pytest.mark.parametrize("how", [{"observe": minigrid_text}, {"render": "image"}], ids=["words", "pictures"])
def test_the_model_is_told_the_mission(name: str, seed: int, how: Any) -> None:
    env = gymnasium.make(f"minigrid:{name}")
    env.reset(seed=seed)
    mission = f"mission: {env.unwrapped.mission}"  # type: ignore[attr-defined]
    seen = gym(f"minigrid:{name}", **how)().reset(seed=seed)
    assert (seen if isinstance(seen, str) else seen[1]["text"]).startswith(mission)


def test_missions_differ() -> None:
    episode: Any = gym("minigrid:BabyAI-GoToObj-v0", observe=minigrid_text)()
    assert len({episode.reset(seed=seed).partition("\n")[0] for seed in range(4)}) == 4


@pytest.mark.parametrize(
    ("wrapper", "reason"),
    [
        ("FullyObsWrapper", "it is the whole grid"),
        ("RGBImgPartialObsWrapper", "maybe a picture"),
        ("ImgObsWrapper", "is a mapping with an"),
    ],
)
def test_what_is_not_the_view_of_the_agent_is_refused(wrapper: str, reason: str) -> None:
    import minigrid.wrappers

    wrapped = getattr(minigrid.wrappers, wrapper)
    kind = gym(lambda: wrapped(gymnasium.make("MiniGrid-Empty-5x5-v0")), observe=minigrid_text)
    with pytest.raises(RuntimeError, match=f"^MiniGrid-Empty-5x5-v0: .*cannot be shown: .*{reason}"):
        kind().reset(seed=0)


def test_minigrid_in_words() -> None:
    kind = gym("minigrid:MiniGrid-Empty-5x5-v0", observe=minigrid_view)
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
