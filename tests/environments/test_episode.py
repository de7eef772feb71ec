"""Episodes from start to end, without a trainer."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import gymnasium
import numpy
import pytest
import torch

from trl_ext import ConfigError
from trl_ext.environments import GymEnvironment, episode_return, gym, minigrid_text, success

from .conftest import WAY, played


def test_an_episode_from_start_to_end(lake: type[GymEnvironment]) -> None:
    episode: Any = lake()
    assert episode.reset(prompt="unused", seed=0) == "0"
    assert [episode.act(move) for move in WAY] == ["4", "8", "9", "10", "14", "15\nThe episode is over."]
    assert episode.step_rewards == [0, 0, 0, 0, 0, 1] and episode.total_reward == 1
    assert episode.done and not episode.truncated and episode.success and episode.failure is None
    assert episode.act("left") == "The episode is over." and episode.late_actions == 1
    assert len(episode.step_rewards) == 6, "what is done after the end counts for nothing"
    assert episode.reset(seed=0) == "0"
    assert episode.step_rewards == [] and not episode.done and not episode.success and episode.late_actions == 0


def test_a_hole_ends_an_episode_without_success(lake: type[GymEnvironment]) -> None:
    episode = played(lake, "down", "right")
    assert episode.done and not episode.success and episode.total_reward == 0


def test_an_episode_without_a_step(lake: type[GymEnvironment]) -> None:
    episode = played(lake)
    assert (episode.total_reward, episode.done, episode.truncated, episode.success) == (0, False, False, False)
    assert episode_return([episode]) == [0.0] == success([episode])


def test_what_the_environment_says_of_success_counts(games: Any) -> None:
    episode = played(gym(games.Told), "0", seed=1)
    assert episode.total_reward == 1 and episode.done and not episode.success


def test_an_invalid_action_is_a_step_with_a_penalty(lake: type[GymEnvironment]) -> None:
    episode: Any = lake()
    episode.reset(seed=0)
    assert episode.act("jump") == "invalid action: 'jump' is none of left, down, right, up"
    assert episode.act() == "invalid action: `act` takes one argument, `action`; got none"
    assert episode.act(direction="left").endswith("`action`; got ['direction']")
    assert episode.act(action=["left"]).startswith("invalid action: ")
    assert episode.act(action=" DOWN ") == "4", "the environment has not moved before"
    assert episode.step_rewards == [-0.1] * 4 + [0.0] and episode.invalid_actions == 4 and not episode.done


def test_invalid_actions_count_towards_the_limit() -> None:
    episode = played(gym("FrozenLake-v1", max_steps=3, invalid_reward=-1.0), "x", "x", "x", "0")
    assert episode.truncated and not episode.done and episode.step_rewards == [-1.0] * 3 and episode.late_actions == 1


def test_a_function_for_observations(games: Any) -> None:
    episode = gym(games.Counting, observe=lambda count: f"at {count}", over="bye")()
    assert episode.reset(seed=2) == "at 2"
    assert [episode.act("0"), episode.act("0")] == ["at 3", "at 4\nbye"]  # type: ignore[attr-defined]


def test_a_function_for_observations_that_fails(games: Any, caplog: pytest.LogCaptureFixture) -> None:
    """TRL would take it for a wrong call of the model and go on."""
    episode: Any = gym(games.Counting, observe=lambda count: str(1 // (6 - count)))()
    episode.reset(seed=4)
    assert episode.act("0") == "1"
    assert "`observe` raised ZeroDivisionError" in episode.act("0")
    assert episode.truncated and episode.failure and "seed 4" in caplog.text


@pytest.mark.parametrize(
    "reward", [numpy.array([0.5]), [0.5], torch.tensor([[0.5]], requires_grad=True), Fraction(1, 2)], ids=repr
)
def test_one_number_in_an_array_is_a_reward(reward: Any, games: Any) -> None:
    kind = gym(lambda: games.Answering(reward, numpy.array([True]), numpy.bool_(False)))
    assert played(kind, "0").step_rewards == [0.5] and played(kind, "0").done
    assert kind.__name__ == "Answering", "a lambda has no name of its own"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((numpy.array([1.0, 2.0]), False, False), r"`reward` was array\(\[1\., 2\.\]\), expected one number"),
        ((None, False, False), r"`reward` was None, expected one number"),
        (("1", False, False), r"`reward` was '1', expected one number"),
        ((1.0, "no", False), r"`terminated` was 'no', expected one number"),
        ((1.0, False, [True, False]), r"`truncated` was \[True, False\], expected one number"),
        ((1.0, False), r"`step` returned tuple of 4, expected the 5 values observation, reward, terminated"),
    ],
    ids=str,
)
def test_a_step_that_is_not_of_gymnasium(
    games: Any, answer: tuple[Any, ...], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    episode = played(gym(lambda: games.Answering(*answer)), "0")
    assert episode.truncated and re.search(reason, episode.failure)
    assert "Answering failed at step 1" in caplog.text


def test_a_reset_that_is_not_of_gymnasium(games: Any) -> None:
    """Unpacking two numbers would take the first for the observation."""

    class Old(games.Counting):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))

        def reset(self, **arguments: Any) -> Any:
            return numpy.zeros(2)

    with pytest.raises(RuntimeError, match=r"^Old: .*`reset` returned ndarray of 2, expected the 2 values"):
        gym(Old)().reset(seed=0)


def test_an_observation_that_cannot_be_shown(games: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Losing(games.Counting):
        def reset(self, **arguments: Any) -> Any:
            return (None if arguments["seed"] == 1 else 3), {}

        def step(self, action: int) -> Any:
            return None, 1.0, False, False, {}

    with pytest.raises(RuntimeError, match=r"^Losing: the observation after reset with seed 1 cannot be shown: None "):
        gym(Losing)().reset(seed=1)
    episode = played(gym(Losing), "0", seed=3)
    assert episode.failure.startswith("the observation cannot be shown: None does not hold numbers")
    assert episode.truncated and "Losing failed at step 1" in caplog.text
    with pytest.raises(RuntimeError, match=r"^Losing: .*`observe` returned 3, expected a text"):
        gym(Losing, observe=lambda count: count)().reset(seed=3)


def test_pictures(games: Any) -> None:
    episode: Any = gym(games.Painted, render="image", image_size=8)()
    (block,) = episode.reset(seed=2)
    assert block["type"] == "image" and block["image"].size == (8, 8) and block["image"].getpixel((3, 3)) == (2, 2, 2)
    (block,) = episode.act("0")
    assert block["image"].getpixel((0, 0)) == (3, 3, 3)
    image, text = episode.act("1")
    assert image["image"].getpixel((0, 0)) == (4, 4, 4) and text == {"type": "text", "text": "The episode is over."}
    both: Any = gym(games.Painted, render="image", observe=str)()
    image, text = both.reset(seed=5)
    assert image["image"].size == (6, 4) and text["text"] == "5"


def test_an_environment_without_a_picture(games: Any) -> None:
    with pytest.raises(RuntimeError, match=r'failed twice: .*make it with render_mode="rgb_array"'):
        gym(lambda: gymnasium.make("FrozenLake-v1"), render="image")().reset(seed=0)


@pytest.mark.parametrize("seconds", [None, pytest.param(20.0, marks=pytest.mark.slow)])
def test_equal_seeds_are_equal_episodes(seconds: float | None) -> None:
    kind = gym("minigrid:MiniGrid-Empty-Random-6x6-v0", observe=minigrid_text, step_seconds=seconds)
    moves = ["forward", "left", "forward", "right", "forward"]

    def course(seed: int) -> list[str]:
        episode: Any = kind()
        return [episode.reset(seed=seed), *(episode.act(move) for move in moves)]

    assert course(3) == course(3)
    assert len({tuple(course(seed)) for seed in range(4)}) > 1
    slippery = gym("FrozenLake-v1")
    assert [played(slippery, *"2121", seed=5).act("2") for _ in range(3)] == [
        played(slippery, *"2121", seed=5).act("2") for _ in range(3)
    ]


def test_rows() -> None:
    kind = gym("FrozenLake-v1")
    assert [row["seed"] for row in kind.rows(3, first_seed=5)] == [5, 6, 7]
    assert kind.rows(1, prompt="Go. ") == [{"prompt": [{"role": "user", "content": "Go. "}], "seed": 0}]


@pytest.mark.parametrize("row", [{}, {"seed": None}, {"seed": 1.5}, {"seed": True}])
def test_a_row_without_a_seed_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"every row needs a whole number `seed`.*`rows\(\)`"):
        gym("FrozenLake-v1")().reset(**row)
