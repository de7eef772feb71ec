"""The mathematics of Dr. MAS: loops of the definition, invariants, and single rows."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.dr_mas import agent_advantages, trajectory_advantages


def team(seed: int, rows: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rewards, group ids, agents, trajectories) of turns that are mixed, in groups and teams of any size."""
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, generator=draw, dtype=torch.float64)
    ids, agents, trajectories = (torch.randint(0, high, (rows,), generator=draw) for high in (3, 3, 4))
    return rewards, ids, agents, trajectories


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(["zero", "reward"]))
def test_it_is_the_loop_of_the_definition(seed: int, scale: bool, alone: str) -> None:
    rewards, ids, agents, _ = team(seed)
    expected = []
    for row in range(len(rewards)):
        others = [rewards[i].item() for i in range(len(rewards)) if ids[i] == ids[row] and agents[i] == agents[row]]
        mean, std = (statistics.mean(others), statistics.stdev(others)) if len(others) > 1 else (0.0, 1.0)
        value = (rewards[row].item() - mean) / (std + 1e-6 if scale else 1)
        expected.append(0.0 if len(others) == 1 and alone == "zero" else value)
    ours = agent_advantages(rewards, ids, agents, scale=scale, alone=alone)
    assert ours.tolist() == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_the_baseline_counts_every_trajectory_once(seed: int) -> None:
    rewards, ids, _, trajectories = team(seed)
    expected = [0.0] * len(rewards)
    for group in ids.unique().tolist():
        rows = [row for row in range(len(rewards)) if ids[row] == group]
        known = {int(trajectories[row]) for row in rows}
        means = {
            each: statistics.mean(rewards[row].item() for row in rows if trajectories[row] == each) for each in known
        }
        if len(means) > 1:
            mean, std = statistics.mean(means.values()), statistics.stdev(means.values())
            for row in rows:
                expected[row] = (means[int(trajectories[row])] - mean) / (std + 1e-6)
    assert trajectory_advantages(rewards, ids, trajectories).tolist() == pytest.approx(expected, abs=1e-9)


def test_one_agent_is_grpo() -> None:
    rewards, ids, _, _ = team(1)
    one = torch.zeros_like(ids)
    assert torch.equal(agent_advantages(rewards, ids, one, eps=1e-4), group_normalize(rewards, ids, eps=1e-4))


def test_rewards_of_one_agent_do_not_move_the_others() -> None:
    """And their shift or scale does not move its own advantages, which plain GRPO's are moved by."""
    rewards, ids, agents, _ = team(2, rows=60)
    moved = torch.where(agents == 1, 100 * rewards + 7, rewards)
    before, after = (agent_advantages(values, ids, agents) for values in (rewards, moved))
    assert torch.equal(before[agents != 1], after[agents != 1])
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)
    assert (group_normalize(rewards, ids) - group_normalize(moved, ids)).abs().max() > 0.5


def test_rows_without_a_reward_or_without_signal_have_exactly_zero() -> None:
    rewards = torch.tensor([1.0, 0.0, math.nan, 0.1, 0.1, 0.1, 5.0])
    ids, agents = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    ours = agent_advantages(rewards, ids, agents)
    assert ours[2:].tolist() == [0.0] * 5 and ours[0] == -ours[1] > 0.7
    assert agent_advantages(rewards, ids, agents, alone="reward")[-1].item() == pytest.approx(5.0, abs=1e-4)
    assert agent_advantages(rewards, ids, agents, alone="reward", scale=False)[-1] == 5.0
    # rows of the group -1 fill up a process
    filled = torch.cat([ids, torch.tensor([-1, -1])])
    values, names = torch.cat([rewards, torch.tensor([math.nan] * 2)]), torch.cat([agents, torch.tensor([0, 1])])
    assert torch.equal(agent_advantages(values, filled, names)[:7], ours)
    baseline = trajectory_advantages(values, filled, names)
    assert baseline[7:].tolist() == [0.0, 0.0] and baseline[0] == baseline[2] != 0, "a turn without a reward has a team"
