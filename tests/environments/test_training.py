"""Environments in the real GRPOTrainer, with its own tool loop."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from trl_ext.environments import episode_return, gym, success
from trl_ext.testing import calls, metrics_of, tiny_trainer


class Watch:
    """The return of episodes, and a copy of every episode that it saw."""

    __name__ = "watched"

    def __init__(self) -> None:
        self.rounds: list[list[dict[str, Any]]] = []

    def __call__(self, environments: Any, completions: Any, **columns: Any) -> list[float | None]:
        self.rounds.append(
            [
                {
                    "rewards": list(episode.step_rewards),
                    "done": episode.done,
                    "truncated": episode.truncated,
                    "failure": episode.failure,
                    "invalid": episode.invalid_actions,
                    "results": [message["content"] for message in completion if message["role"] == "tool"],
                }
                for episode, completion in zip(environments, completions, strict=True)
            ]
        )
        return episode_return(environments, **columns)

    @property
    def episodes(self) -> list[dict[str, Any]]:
        return [episode for round in self.rounds for episode in round]


@pytest.fixture
def play(tool_model: str, tmp_path: Path) -> Callable[..., tuple[Any, Watch]]:
    """Trains with episodes in which the model says one action, now and then; returns trainer and episodes."""

    def train(kind: type[Any], seeds: list[int], action: str = "0", **settings: Any) -> tuple[Any, Watch]:
        rows = [kind.rows(1, first_seed=seed, prompt="go ")[0] for seed in seeds]
        watch = Watch()
        defaults: dict[str, Any] = {
            "max_steps": 2,
            "max_completion_length": 400,
            "max_tool_calling_iterations": 4,
            "generation_kwargs": calls(tool_model, "act", likelihood=5.0, action=action),
            "shuffle_dataset": False,
        }
        trainer = tiny_trainer(
            "grpo",
            tool_model,
            tmp_path / "run",
            rewards=[watch],
            data=Dataset.from_list(rows),
            trainer={"environment_factory": kind},
            **defaults | settings,
        )
        trainer.train()
        return trainer, watch

    return train


def test_frozen_lake_from_start_to_end(play: Any) -> None:
    lake = gym("FrozenLake-v1", actions=["left", "down", "right", "up"], is_slippery=False)
    trainer, watch = play(lake, [0, 1], action="down")
    lengths = {len(episode["rewards"]) for episode in watch.episodes}
    assert len(watch.rounds) == 2 and {0, 3} <= lengths, "episodes without a step and ended ones, side by side"
    for episode in watch.episodes:
        shown = ["4", "8", "12\nThe episode is over."]
        assert episode["results"][:3] == shown[: len(episode["results"])]
        assert episode["done"] == (len(episode["rewards"]) == 3) and not episode["truncated"]
    logged = metrics_of(trainer)[0]
    assert logged["environment/steps"] == pytest.approx(
        sum(len(episode["rewards"]) for episode in watch.rounds[0]) / len(watch.rounds[0])
    )
    assert logged["environment/failed"] == 0 and logged["tools/failure_frequency"] == 0


def test_a_group_starts_in_the_same_state_and_rows_in_different_ones(play: Any, games: Any) -> None:
    _, watch = play(gym(games.Counting), [20, 40])
    starts = [[episode["results"][:1] for episode in round] for round in watch.rounds]
    for round in starts:
        groups = [{result[0] for result in round[start : start + 4] if result} for start in (0, 4)]
        assert all(len(group) <= 1 for group in groups), groups
        assert set().union(*groups) <= {"21", "41"}
    assert {result[0] for round in starts for result in round if result} == {"21", "41"}


def test_invalid_actions_are_steps_and_no_failed_calls(play: Any, games: Any) -> None:
    trainer, watch = play(gym(games.Counting, max_steps=2), [9, 9], action="jump")
    played = [episode for episode in watch.episodes if episode["rewards"]]
    assert played and all(set(episode["rewards"]) == {-0.1} for episode in played)
    assert any(episode["truncated"] for episode in played), "the step limit counts them"
    assert all("invalid action: 'jump' is none of 0, 1" in episode["results"][0] for episode in played)
    logged = metrics_of(trainer)[0]
    assert logged["tools/failure_frequency"] == 0 and logged["environment/invalid_actions"] > 0


@pytest.mark.parametrize(
    ("game", "seconds", "reason"),
    [
        ("Raising", None, "KeyError: 'a broken wall'"),
        pytest.param("Dying", 20.0, "its process was killed by SIGABRT", marks=pytest.mark.slow),
        pytest.param("Hanging", 1.0, "no answer within 1 s; its process was stopped", marks=pytest.mark.slow),
        ("NaN", None, "the reward was nan"),
    ],
)
def test_a_run_goes_on_where_an_environment_fails(
    play: Any, games: Any, game: str, seconds: float | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Episodes of the row with seed 1 fail at the first step, those of the other row never."""
    caplog.set_level(logging.WARNING)
    trainer, watch = play(gym(getattr(games, game), step_seconds=seconds), [1, 50], max_steps=1)
    failed = [episode for episode in watch.episodes if episode["failure"]]
    assert failed and all(episode["failure"] == reason and episode["truncated"] for episode in failed)
    assert f"{game} failed at step 1 of the episode with seed 1: {reason}" in caplog.text
    assert 0 < metrics_of(trainer)[0]["environment/failed"] < 1
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert torch.tensor(list(trainer._logs["advantages"])).isfinite().all()


def test_a_run_stops_where_every_episode_fails(play: Any, games: Any, tool_model: str) -> None:
    always = calls(tool_model, "act", likelihood=30.0, end=-30.0, action="0")
    with pytest.raises(RuntimeError, match=r"failed in every episode of this round, at last: KeyError"):
        play(gym(games.Raising), [1, 1], generation_kwargs=always)


def test_success_is_a_reward_too(tool_model: str, tmp_path: Path, games: Any) -> None:
    kind = gym(games.Counting)
    trainer = tiny_trainer(
        "grpo",
        tool_model,
        tmp_path / "run",
        rewards=[episode_return, success],
        data=Dataset.from_list([kind.rows(1, first_seed=1, prompt="go ")[0] for _ in range(2)]),
        trainer={"environment_factory": kind},
        max_steps=1,
        max_completion_length=200,
        generation_kwargs=calls(tool_model, "act", likelihood=5.0, action="0"),
    )
    trainer.train()
    logged = metrics_of(trainer)[0]
    assert 0 < logged["rewards/success/mean"] == logged["rewards/episode_return/mean"] == logged["environment/success"]
