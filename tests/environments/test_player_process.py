"""Environments that fail, in the trainer's process and in one of their own."""

from __future__ import annotations

import logging
import math
import os
import time
from typing import Any

import pytest

from trl_ext.environments import gym

from .conftest import played


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


@pytest.mark.parametrize("seconds", [None, 20.0])
def test_an_environment_that_leaves_ends_the_episode(
    games: Any, seconds: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    episode: Any = gym(games.Leaving, step_seconds=seconds)()
    episode.reset(seed=1)
    assert "SystemExit: it called sys.exit(2)" in episode.act("0") and "Leaving failed at step 1" in caplog.text
    assert episode.truncated and episode.reset(seed=2) == "2"


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
