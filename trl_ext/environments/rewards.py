"""Rewards of episodes, for TRL's `reward_funcs`. In YAML they are called `trl_ext.environments.episode_return`.

An episode whose environment failed has the reward None, which TRL leaves out of its group. A round in which every
episode of a process failed stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .episode import GymEnvironment


def episode_return(
    environments: Sequence[GymEnvironment], log_metric: Callable[[str, float], None] | None = None, **columns: Any
) -> list[float | None]:
    """Returns the sum of the rewards of every episode."""
    return _scored(environments, lambda episode: episode.total_reward, log_metric)


def success(
    environments: Sequence[GymEnvironment], log_metric: Callable[[str, float], None] | None = None, **columns: Any
) -> list[float | None]:
    """Returns 1 for an episode that succeeded (see `GymEnvironment.success`), else 0."""
    return _scored(environments, lambda episode: float(episode.success), log_metric)


def _scored(
    episodes: Sequence[GymEnvironment],
    score: Callable[[GymEnvironment], float],
    log_metric: Callable[[str, float], None] | None,
) -> list[float | None]:
    """Scores the episodes that did not fail, and logs how all of them went."""
    if episodes and all(episode.failure for episode in episodes):
        raise RuntimeError(f"the environment failed in every episode of this round, at last: {episodes[-1].failure}")
    if log_metric is not None:
        for episode in episodes:
            _log(episode, log_metric)
    return [None if episode.failure else score(episode) for episode in episodes]


def _log(episode: GymEnvironment, log_metric: Callable[[str, float], None]) -> None:
    values = {
        "success": episode.success,
        "steps": len(episode.step_rewards),
        "done": episode.done,
        "truncated": episode.truncated,
        "invalid_actions": episode.invalid_actions,
        "late_actions": episode.late_actions,
        "failed": episode.failure is not None,
    }
    for name, value in values.items():
        log_metric(f"environment/{name}", float(value))
