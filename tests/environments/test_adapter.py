"""One episode at a time, without a trainer: actions, observations, seeds, limits, and environments that fail."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy
import pytest
from transformers.utils import get_json_schema

from trl_ext import ConfigError
from trl_ext.environments import GymEnvironment, episode_return, gym, minigrid_text, success
from trl_ext.environments.actions import reader
from trl_ext.environments.observations import describe
from trl_ext.environments.player import Spaces
from trl_ext.trl_internals import seams

MOVES = ["left", "down", "right", "up"]
WAY = ["down", "down", "right", "right", "down", "right"]


@pytest.fixture(scope="module")
def lake() -> type[GymEnvironment]:
    return gym("FrozenLake-v1", actions=MOVES, is_slippery=False)


def played(kind: type[GymEnvironment], *actions: str, seed: int = 0) -> Any:
    episode = kind()
    episode.reset(seed=seed)
    for action in actions:
        episode.act(action)
    return episode


# --- an episode -------------------------------------------------------------------------------------------------------


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


def test_the_tool_has_a_schema_and_reset_is_none(lake: type[GymEnvironment]) -> None:
    function = get_json_schema(lake().act)["function"]
    assert function["name"] == "act" and function["parameters"]["required"] == ["action"]
    assert function["parameters"]["properties"]["action"]["enum"] == MOVES
    assert "left, down, right, up" in lake.prompt() and lake.__name__ == "FrozenLakev1"


def test_what_the_environment_says_of_success_counts(games: Any) -> None:
    episode = played(gym(games.Told), "0", seed=1)
    assert episode.total_reward == 1 and episode.done and not episode.success


# --- actions ----------------------------------------------------------------------------------------------------------


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
    read = reader(Spaces(space, None, {}, None), None).read
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
    ("make", "message"),
    [
        (lambda: gym("FrozenLak-v1"), r"Did you mean: `FrozenLake`\?"),
        (lambda: gym("MiniGrid-Nowhere-v0"), r"written package:ID, as in minigrid:ID"),
        (lambda: gym("FrozenLake-v1", slippery=1), r"unexpected keyword argument 'slippery'"),
        (lambda: gym("FrozenLake-v1", slippery=1, step_seconds=9), r"unexpected keyword argument 'slippery'"),
        (lambda: gym("FrozenLake-v1", actions=["a"]), r"`actions` is a list of 1 words, .* Discrete\(4\)"),
        (lambda: gym("FrozenLake-v1", actions={"a": 4}), r"maps 'a' to 4, which is not in the action space"),
        (lambda: gym("FrozenLake-v1", actions=["a", "A", "b", "c"]), r"differ in more than case"),
        (lambda: gym("minigrid:MiniGrid-Empty-5x5-v0"), r"trl_ext\.environments\.minigrid_text"),
        (lambda: gym("FrozenLake-v1", max_steps=0), r"`max_steps` must be 1 or more"),
        (lambda: gym("FrozenLake-v1", step_seconds=0), r"`step_seconds` must be positive"),
        (lambda: gym("FrozenLake-v1", render="human"), r"`render` is \"image\" or nothing"),
        (lambda: gym("FrozenLake-v1", observe="math.nothing"), r"there is no 'math\.nothing'"),
        (lambda: gym(gymnasium.Env, is_slippery=True), r"`env` is a function"),
        (lambda: reader(Spaces(gymnasium.spaces.Dict(), None, {}, None), None), r"Give `actions`: a mapping"),
    ],
)
def test_what_cannot_work_is_said_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_without_gymnasium_it_is_said_what_to_install() -> None:
    code = """
        import sys
        import trl_ext.environments
        assert not {"gymnasium", "torch", "numpy"} & set(sys.modules)
        sys.modules["gymnasium"] = None
        trl_ext.environments.gym("FrozenLake-v1")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert 'gymnasium is not installed: pip install "trl_ext[environments]"' in done.stderr, done.stderr


# --- observations -----------------------------------------------------------------------------------------------------


def test_observations_by_default() -> None:
    spaces = gymnasium.spaces
    assert describe(spaces.Discrete(3))(numpy.int64(2)) == "2"
    assert describe(spaces.Text(9))("hello") == "hello"
    assert describe(spaces.Box(-1, 1, (2, 2)))(numpy.array([[1, 0.12345], [-1e-9, 0]])) == "[1, 0.123, -1e-09, 0]"
    both = describe(spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple((spaces.MultiBinary(2),))))
    assert both({"a": 1, "b": (numpy.array([1, 0]),)}) == "a: 1\nb: 0: [1, 0]"
    with pytest.raises(ConfigError, match="no text by default"):
        describe(spaces.Box(0, 1, (33,)))


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


def test_pictures_need_a_tool_loop_that_carries_them(games: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "trl_version", lambda: seams.Version("1.14.0"))
    with pytest.raises(ConfigError, match=r"pictures need TRL 1\.15 or later; .* of 1\.14\.0 .*`observe`"):
        gym(games.Painted, render="image")
    gym(games.Painted, observe=str)  # in words they do not


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


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 20.0])
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


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 20.0])
def test_an_exception_ends_the_episode(games: Any, seconds: float | None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    episode: Any = gym(games.Raising, step_seconds=seconds)()
    episode.reset(seed=2)
    assert episode.act("0") == "3"
    assert episode.act("0") == "the environment failed: KeyError: 'a broken wall'\nThe episode is over."
    assert "Raising failed at step 2 of the episode with seed 2: KeyError" in caplog.text
    assert episode.truncated and not episode.done and not episode.success and episode.step_rewards == [0, 0]
    assert episode.act("0") == "The episode is over." and episode.late_actions == 1
    assert episode.reset(seed=3) == "3" and episode.act("0") == "4" and episode.failure is None


@pytest.mark.parametrize(
    ("game", "reason"),
    [("Dying", "its process was killed by SIGABRT"), ("Exiting", "its process ended with exit code 3")],
)
def test_a_crash_costs_an_episode_and_not_the_run(games: Any, game: str, reason: str) -> None:
    episode: Any = gym(getattr(games, game), step_seconds=20.0)()
    episode.reset(seed=1)
    assert episode.act("0") == f"the environment failed: {reason}\nThe episode is over."
    assert episode.reset(seed=2) == "2" and episode.act("0") == "3"


def test_an_environment_that_hangs_is_stopped(games: Any) -> None:
    episode: Any = gym(games.Hanging, step_seconds=1.0)()
    episode.reset(seed=1)
    process = episode._player._process
    began = time.monotonic()
    assert episode.act("0").startswith("the environment failed: no answer within 1 s; its process was stopped")
    assert time.monotonic() - began < 30 and process.poll() is not None, "the process is gone"
    assert episode.reset(seed=2) == "2" and episode.act("0") == "3"


def test_what_an_environment_prints_disturbs_nothing(games: Any) -> None:
    assert played(gym(games.Chatty, step_seconds=20.0), "0", seed=1).success


def test_processes_end_with_their_episodes(games: Any) -> None:
    episode: Any = gym(games.Counting, step_seconds=20.0)()
    episode.reset(seed=1)
    process = episode._player._process
    assert process.poll() is None and process.pid != os.getpid()
    del episode
    assert process.poll() is not None


@pytest.mark.parametrize("seconds", [None, 20.0])
def test_a_reward_that_is_no_number(games: Any, seconds: float | None, caplog: pytest.LogCaptureFixture) -> None:
    episode = played(gym(games.NaN, step_seconds=seconds), "0", "0", seed=2)
    assert episode.step_rewards[0] == 0.5 and math.isnan(episode.step_rewards[1]) and math.isnan(episode.total_reward)
    assert episode.truncated and episode.failure == "the reward was nan" and "the reward was nan" in caplog.text


def test_a_reset_that_fails_is_tried_again(games: Any, caplog: pytest.LogCaptureFixture) -> None:
    games.Broken.tries = 0
    episode = gym(games.Broken)()
    assert episode.reset(seed=7) == "7" and "trying once more" in caplog.text
    with pytest.raises(RuntimeError, match=r"reset with seed 13 failed twice: ConnectionError: no server"):
        episode.reset(seed=13)


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_rewards_leave_failed_episodes_out(games: Any, lake: type[GymEnvironment]) -> None:
    failed = played(gym(games.Raising), "0", seed=1)
    logged: list[tuple[str, float]] = []
    episodes = [played(lake, *WAY), failed, played(lake, "down", "sideways")]
    assert episode_return(episodes, log_metric=lambda *pair: logged.append(pair)) == [1.0, None, -0.1]
    assert success(episodes) == [1.0, None, 0.0]
    assert [value for name, value in logged if name == "environment/failed"] == [0.0, 1.0, 0.0]
    assert [value for name, value in logged if name == "environment/steps"] == [6.0, 1.0, 2.0]
    with pytest.raises(RuntimeError, match="failed in every episode of this round, at last: KeyError"):
        episode_return([failed, failed])
