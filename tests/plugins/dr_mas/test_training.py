"""Dr. MAS in real trainers: rollouts of a team with one row per turn, columns in place of agents, and its limit."""

from __future__ import annotations

import re
import statistics
from pathlib import Path
from typing import Any

import pytest

import trl_ext
from tests.known_rows import assert_same_training, logged, moved, train_known
from tests.plugins.dr_mas.teams import Pair, by_agent
from trl_ext.testing import conformance, tiny_data

COMMON: dict[str, Any] = {"rewards": [by_agent], "beta": 0.0, "optim": "sgd", "learning_rate": 0.1}


def compared(values: dict[Any, list[tuple[int, float]]], rows: int) -> list[float]:
    """Returns each row's reward, normalised over the rows of one key."""
    expected = [0.0] * rows
    for pairs in values.values():
        rewards = [reward for _, reward in pairs]
        if len(set(rewards)) > 1:
            for row, reward in pairs:
                expected[row] = (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-6)
    return expected


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_two_steps_of_a_team(kind: str, train: Any, plugin: Any, look: str) -> None:
    """Rewards and advantages belong to the agent of the row, whatever rows a micro-batch holds."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with trl_ext.enable(plugin(Pair), "dr-mas", look):
        trainer = train(kind, **COMMON, **sizes)
        rounds = trainer._trl_ext.plugins["look"].rounds
    with trl_ext.enable(plugin(Pair)):
        plain = train(kind, **COMMON, **sizes)
    assert len(rounds) == 2 and moved(trainer, plain) > 1e-4
    for step, round in enumerate(rounds):
        agents, numbers = round.fields["agent"], round.fields["trajectory"]
        assert agents == [who for row in range(8) for who in ("solver", "verifier", *(["solver"] * (row % 2)))]
        assert numbers == [row for row in range(8) for _ in range(2 + row % 2)]
        assert round.group_ids.tolist() == [number // 4 for number in numbers]
        assert [len(prompt) for prompt in round.prompts[:5]] == [1, 2, 1, 2, 1], "what each agent was asked"
        groups: dict[Any, list[tuple[int, float]]] = {}
        for row, reward in enumerate(round.rewards[:, 0].tolist()):
            groups.setdefault((numbers[row] // 4, agents[row]), []).append((row, reward))
        assert round.advantages.tolist() == pytest.approx(compared(groups, 20), abs=1e-4)
        assert logged(trainer, "dr-mas/agents")[step] == 2 and logged(trainer, "dr-mas/alone")[step] == 0
        loud = [reward for (_, who), pairs in groups.items() for _, reward in pairs if who == "verifier"]
        assert logged(trainer, "dr-mas/reward/verifier")[step] == pytest.approx(statistics.mean(loud), rel=1e-5)
        assert 0.5 < logged(trainer, "dr-mas/advantage_size/solver")[step] < 1.5


def test_the_baseline_of_the_paper(train: Any, plugin: Any, look: str) -> None:
    with trl_ext.enable(plugin(Pair), {"dr-mas": {"normalise": "trajectory"}}, look):
        trainer = train(max_steps=1, **COMMON)
        (round,) = trainer._trl_ext.plugins["look"].rounds
    numbers, rewards = round.fields["trajectory"], round.rewards[:, 0].tolist()
    means = [statistics.mean(r for r, n in zip(rewards, numbers, strict=True) if n == each) for each in range(8)]
    of_trajectory = compared({group: [(n, means[n]) for n in range(8) if n // 4 == group] for group in (0, 1)}, 8)
    assert round.advantages.tolist() == pytest.approx([of_trajectory[number] for number in numbers], abs=1e-4)


def test_one_value_is_grpo_and_two_values_of_a_column_are_compared_apart(train: Any, plugin: Any, look: str) -> None:
    data = tiny_data().add_column("task", ["sum", "word"] * 8).add_column("one", ["x"] * 16)
    plain = train_known(train, plugin, [], data=data)
    limit = train_known(train, plugin, [{"dr-mas": {"column": "one", "eps": 1e-4}}], data=data)
    assert_same_training(plain, limit, 1e-6)
    by_task = train_known(train, plugin, [{"dr-mas": {"column": "task", "normalise": "batch"}}, look], data=data)
    round = by_task.used["look"].rounds[0]
    rewards = round.rewards[:, 0].tolist()
    tasks: dict[Any, list[tuple[int, float]]] = {}
    for row, reward in enumerate(rewards):
        tasks.setdefault(round.rows[row]["task"], []).append((row, reward))
    assert sorted(map(len, tasks.values())) == [4, 8]
    assert round.advantages.tolist() == pytest.approx(compared(tasks, 12), abs=1e-4)
    assert moved(plain, by_task) > 1e-4


def test_the_team_and_the_reward_of_the_page(train: Any, look: str, tmp_path: Path) -> None:
    """The verifier of the tiny model says anything, so that some answers are tried again and some are not."""
    page = (Path(__file__).parents[3] / "plugins" / "docs" / "dr-mas.md").read_text()
    team, reward = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "my_team.py").write_text(team.replace('"no" in', '"e" in'))
    names: dict[str, Any] = {}
    exec(reward, names)
    data = tiny_data().add_column("solution", ["e"] * 16)
    with trl_ext.enable(str(tmp_path / "my_team.py"), "dr-mas", look):
        trainer = train(rewards=[names["solved"]], data=data, max_steps=1, max_completion_length=24)
        (round,) = trainer._trl_ext.plugins["look"].rounds
    agents, numbers, rewards = round.fields["agent"], round.fields["trajectory"], round.rewards[:, 0].tolist()
    assert sorted(set(numbers)) == list(range(8)) and agents.count("verifier") == 8 and 8 < agents.count("solver") < 16
    last = {number: row for row, (who, number) in enumerate(zip(agents, numbers, strict=True)) if who == "solver"}
    assert rewards == [float("e" in round.completions[last[number]][-1]["content"]) for number in numbers]


@pytest.mark.slow
def test_a_column_on_one_and_two_processes(tmp_path: Path) -> None:
    data = tiny_data().add_column("task", ["sum", "word"] * 8)
    chosen = {"column": "task", "normalise": "batch"}
    checks = conformance("dr-mas", tmp_path, chosen, kinds=("grpo",), processes=2, data=data)
    assert not [check for check in checks if not check.passed]
    assert any("2 processes" in check.name for check in checks)
