"""Rewards of episodes."""

from __future__ import annotations

from typing import Any

import pytest

from trl_ext.environments import GymEnvironment, episode_return, gym, success

from .conftest import WAY, played


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
