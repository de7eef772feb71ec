"""The built-in tasks with an environment."""

from __future__ import annotations

import inspect

import pytest

from trl_ext import lab
from trl_ext.lab.builtin import (
    doors,
    gymnasium_games,
    number_line,
    walks,
)

TASKS = lab.tasks()


def test_a_walk_on_the_line() -> None:
    walk = walks.Line()
    assert walk.reset(start=[2], goal=[4], size=[5], prompt="unused") == "2"
    assert [walk.move(1), walk.move(-1), walk.move(1), walk.move(1), walk.move(1)] == ["3", "2", "3", "goal", "stop"]
    assert walk.step_rewards == [0, 0, 0, 1] and walk.done and not walk.truncated and walk.late_moves == 1
    assert walks.walked([walk]) == [0.9]
    assert walks.behaviour([walk]) == {"reached": [1], "moves": [4], "moves_to_goal": [4]}
    assert walk.reset(start=[0], goal=[4], size=[5]) == "0" and walk.step_rewards == [] and not walk.done
    assert [walk.move(-1) for _ in range(9)] == ["0"] * 7 + ["stop"] * 2
    assert walk.truncated and not walk.done and walks.behaviour([walk])["moves_to_goal"] == [None]


def test_a_walk_on_the_grid() -> None:
    walk = walks.Grid()
    assert walk.reset(start=[0, 3], goal=[1, 2], size=[4, 4]) == "03"
    assert [walk.up(), walk.left(), walk.right(), walk.down()] == ["03", "03", "13", "goal"]
    assert walk.step_rewards == [-0.05, -0.05, 0, 1] and walks.walked([walk]) == [pytest.approx(0.9)]
    assert all(sum(row["start"]) <= sum(row["goal"]) - 2 for row in walks.grid_rows("train", 50, 0))


def test_a_row_of_doors() -> None:
    row = doors.Doors()
    assert row.reset(signs="abcdab", prompt="unused") == "a"
    assert [row.turn(key) for key in (3, 3, 1, 4, 2)] == ["b", "b", "c", "d", "a"]
    assert not row.done and doors.behaviour([row])["fitted"] == [pytest.approx(4 / 5)]
    assert [row.turn(3), row.turn(1), row.turn(1)] == ["b", "out", "late"]
    assert row.step_rewards == [pytest.approx(fits / 6) for fits in (1, 0, 1, 1, 1, 1, 1)] and row.done
    assert doors.opened([row]) == [1] and row.late_tries == 1 and doors.behaviour([row])["out"] == [1]
    assert row.reset(signs="dddddd") == "d" and not row.done and row.step_rewards == []
    assert [row.turn(1) for _ in range(9)] == ["d"] * 7 + ["late"] * 2
    assert row.done and doors.behaviour([row]) == {"out": [0], "tries": [8], "fitted": [0], "late": [1]}
    ends = [trace["completion"][-2]["content"] for trace in doors.traces(2000, 0)]
    assert set(ends) == {"out", "late"} and 0.03 < ends.count("out") / len(ends) < 0.08


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.environment])
def test_an_environment_offers_its_actions_and_no_other_tools(name: str) -> None:
    """TRL makes every public method of an environment a tool, inherited ones too, but `reset` and `get_reward`."""
    actions = {"line-walk": {"move"}, "grid-walk": {"up", "down", "left", "right"}, "doors": {"turn"}}
    actions["number-line"] = {"move"}
    make = TASKS[name].environment
    assert make is not None
    environment = make()
    now = inspect.getmembers(type(environment), inspect.isfunction)
    before_1_15 = inspect.getmembers(environment, inspect.ismethod)
    for members in (now, before_1_15):
        methods = {method for method, _ in members if method[0] != "_"}
        assert methods - {"reset", "get_reward"} == actions.get(name, {"act"})


def test_a_line_of_numbers() -> None:
    line = number_line.NumberLine()
    assert line.reset(start=2, goal=5, prompt="unused") == "2>5"
    assert [line.move(by) for by in (1, -1, 1, 1, 1, 1)] == ["3>5", "2>5", "3>5", "4>5", "there", "late"]
    assert line.step_rewards == [pytest.approx(way / 3) for way in (1, -1, 1, 1, 1)] and line.done
    assert number_line.way_made([line]) == [pytest.approx(1)]
    assert number_line.behaviour([line]) == {
        "arrived": [1],
        "moves": [5],
        "nearer": [pytest.approx(4 / 5)],
        "late": [1],
    }
    assert line.reset(start=0, goal=4) == "0>4" and not line.done and line.step_rewards == []
    assert [line.move(-1) for _ in range(9)] == ["0>4"] * 7 + ["late"] * 2 and not line.arrived
    assert line.step_rewards == [-1 / 4] * 8 and line.reset(start=7, goal=1) == "7>1" and line.move(-1) == "6>1"
    assert line.step_rewards == [pytest.approx(1 / 6)]
    assert {abs(row["start"] - row["goal"]) for row in number_line.rows("train", 200, 0)} == {3, 4, 5, 6}
    ends = [trace["completion"][-2]["content"] for trace in number_line.traces(1000, 0)]
    assert set(ends) == {"there", "late"} and 0.2 < ends.count("there") / len(ends) < 0.45


@pytest.mark.parametrize("name", ["frozen-lake", "minigrid", pytest.param("minigrid-view", marks=pytest.mark.slow)])
def test_walks_in_real_environments(name: str) -> None:
    task = TASKS[name]
    traces = task.traces(300, 0)
    ends = [trace["completion"][-2]["content"] for trace in traces]
    texts = [end if isinstance(end, str) else end[-1]["text"] for end in ends]
    assert all(text.endswith(gymnasium_games.OVER) for text in texts)
    environment = task.environment() if task.environment else None
    rows = task.rows("train", 300, 0)
    reached = 0
    for row, trace in zip(rows, traces, strict=True):
        environment.reset(**row)
        for message in trace["completion"]:
            for made in message.get("tool_calls") or ():
                environment.act(**made["function"]["arguments"])
        assert environment.done or environment.truncated
        reached += environment.success
    assert 0.05 < reached / 300 < 0.4, "walks at random get there now and then"
    late = gymnasium_games.played([environment])
    environment.act("left")
    assert gymnasium_games.played([environment]) == [pytest.approx(late[0] - 0.1)]


def test_held_out_starts_are_others() -> None:
    rows = gymnasium_games.room_rows
    train = {row["seed"] for seed in range(5) for row in rows("train", 256, seed)}
    assert len(train) == 5 * 256 and not train & {row["seed"] for row in rows("test", 64, 0)}
