"""Dr. MAS before training: what is refused and warned of, and the same numbers on every process."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import trl_ext
from tests.engine.stages.ranks import Ranks, RankView
from tests.plugins.dr_mas.teams import Pair
from tests.refusals import refused, unloadable
from trl_ext.testing import tiny_data
from trl_ext_hooks import UsageError
from trl_ext_plugins.dr_mas import NAMED, DrMAS


def test_rows_without_agents_are_refused(build: Any, plugin: Any) -> None:
    with (
        trl_ext.enable("dr-mas"),
        refused(
            trl_ext.ConfigError,
            "dr-mas: nothing gives rows a value 'agent': the training data have prompt, answer, index, and no plugin",
            "Add a plugin whose rollout has a team of agents, or set dr-mas.column to a column.",
        ),
    ):
        build(cls=unloadable("grpo"))
    with (
        trl_ext.enable("dr-mas", dr_mas={"column": "index", "normalise": "trajectory"}),
        refused(trl_ext.ConfigError, "rows a value 'trajectory'", "set dr-mas.trajectory_column to a column"),
    ):
        build(cls=unloadable("grpo"))
    # the ways out
    with trl_ext.enable(plugin(Pair), "dr-mas"):
        assert build()._trl_ext.plan.notes == ()
    with trl_ext.enable("dr-mas", dr_mas={"column": "answer", "normalise": "batch"}):
        assert build(remove_unused_columns=True)._trl_ext.plan.needs["column:answer"] == ("dr-mas",)
    with trl_ext.enable("dr-mas", dr_mas={"column": "answer"}):
        (note,) = build()._trl_ext.plan.notes
    assert (
        "all rows of a prompt have the same value in the column 'answer'" in note and "dr-mas.normalise=batch" in note
    )


def made_round(view: Any, agents: list[str], rewards: list[float]) -> tuple[Any, dict[str, Any]]:
    """The part of a round that the plugin reads, for one process, and what it logs."""
    logged: dict[str, Any] = {}
    count = len(rewards) // view.num_processes
    start = view.process_index * count
    return types.SimpleNamespace(
        trainer=view,
        total_reward=torch.tensor(rewards, dtype=torch.float64),
        group_ids=torch.arange(len(rewards)) // 6,
        rows=[{}] * count,
        columns={"agent": agents[start : start + count], "trajectory": list(range(start, start + count))},
        log=lambda name, values, count=None: logged.update({name: torch.as_tensor(values).tolist()}),
    ), logged


@pytest.mark.parametrize("normalise", ["prompt", "batch", "trajectory"])
def test_every_process_gets_the_advantages_of_one(normalise: Any) -> None:
    """A group lies on both processes, and each of them meets the agents in another order."""
    agents = ["b", "a", "a", "b", "a", "b", "a", "b", "c", "b", "a", "c"]
    rewards = [float((7 * row * row) % 11) for row in range(12)]

    def work(ranks: Ranks, rank: int) -> tuple[list[float], dict[str, Any]]:
        round, logged = made_round(RankView(ranks, rank), agents, rewards)
        return DrMAS(DrMAS.Options(normalise=normalise)).advantages(round).tolist(), logged

    (alone,) = Ranks(1).run(lambda rank: work(Ranks(1), rank))
    for count in (2, 3):
        ranks = Ranks(count)
        assert ranks.run(lambda rank, ranks=ranks: work(ranks, rank)) == [alone] * count
    assert len(set(alone[0])) > 4 and alone[1]["agents"] == 3.0


def test_a_field_that_is_missing_stops_every_process() -> None:
    ranks = Ranks(2)

    def work(rank: int) -> Any:
        round, _ = made_round(RankView(ranks, rank), ["a"] * 12, [1.0] * 12)
        if rank:
            del round.columns["agent"]
        return DrMAS().advantages(round)

    for error in ranks.run(work):
        assert isinstance(error, UsageError) and "rows of this round have no value 'agent'" in str(error)


def test_only_the_first_agents_have_metrics() -> None:
    agents = [f"tool {row // 2}" for row in range(60)]
    round, logged = made_round(RankView(Ranks(1), 0), agents, [float(row % 5) for row in range(60)])
    DrMAS().advantages(round)
    assert logged["agents"] == 30 and len([name for name in logged if name.startswith("reward/")]) == NAMED
    assert logged["reward/tool 0"] == [0.0, 1.0]


def test_a_column_of_the_data_reaches_it(build: Any) -> None:
    data = tiny_data().add_column("agent", [1, 2] * 8)
    with trl_ext.enable("dr-mas", dr_mas={"normalise": "batch"}):
        trainer = build(data=data, max_steps=1)
        trainer.train()
    assert {"dr-mas/reward/1", "dr-mas/reward/2"} <= trainer.state.log_history[0].keys()
