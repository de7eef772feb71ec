"""The built-in tasks: data that depends on seeds only, rewards and behaviours on answers typed by hand."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import pytest

from trl_ext import lab
from trl_ext.lab.builtin import (
    calculator,
    checks,
    doors,
    gymnasium_games,
    letters,
    lookup,
    loud_quiet,
    modes,
    number_line,
    walks,
)
from trl_ext.lab.builtin.chains import Chain
from trl_ext.lab.messages import assistant, call, calls_made, drawn, final_text, result
from trl_ext.lab.model import _tokenized
from trl_ext.lab.pictures import as_json
from trl_ext.lab.tokenizer import Vocabulary

TASKS = lab.tasks()
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
HELD_OUT = {  # what of a prompt never occurs in training, where something is held out
    "loud-quiet": lambda row: True,
    "modes": lambda row: row["kind"] == "hard",
    "calculator": lambda row: row["kind"] == "product",
    "lookup": lambda row: row["kind"] != "near",
    "checks": lambda row: True,
}


def said(*texts: str) -> list[Any]:
    return [assistant(text) for text in texts]


def question(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


@every_task
def test_rows_and_traces_depend_on_their_arguments_only(task: lab.Task) -> None:
    random.seed(1)
    first = json.dumps([task.rows("train", 30, 0), task.rows("test", 30, 0), task.traces(30, 0)], default=as_json)
    random.seed(2)
    again = [task.rows("train", 30, 0), task.rows("test", 30, 0), task.traces(30, 0)]
    assert json.dumps(again, default=as_json) == first
    assert (
        [len(task.rows("train", size, 3)) for size in (0, 7, 100)]
        == [0, 7, 100]
        == [len(task.traces(size, 3)) for size in (0, 7, 100)]
    )
    assert task.traces(30, 1) != task.traces(30, 0)
    if task.name not in ("right-letter", "line-walk", "frozen-lake"):  # the same few questions in any order
        assert task.rows("train", 30, 1) != task.rows("train", 30, 0)


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_prompts_are_new(name: str) -> None:
    task = TASKS[name]
    held_out = [question(row) for row in task.rows("test", 200, 0) if HELD_OUT[name](row)]
    seen = {question(row) for row in task.rows("train", 2000, 0)}
    if name != "lookup":  # there the traces make the entries up
        seen |= {question(trace) for trace in task.traces(2000, 0)}
    assert len(held_out) > 90 and not seen & set(held_out)


@every_task
def test_traces_fit_the_task(task: lab.Task) -> None:
    """Every character is a token, nothing is too long, and the model is as small as promised."""
    vocabulary = Vocabulary.of(task)
    tokenizer = vocabulary.build()
    rows = _tokenized(task, tokenizer, json.loads(json.dumps(task.traces(200, 0), default=as_json)))
    assert len(tokenizer) < 200
    for row, trace in zip(rows, task.traces(200, 0), strict=True):
        learnt = tokenizer.decode([token for token in row["labels"] if token != -100])
        spoken = [message["content"] for message in trace["completion"] if message["role"] == "assistant"]
        assert all(text in learnt for text in spoken)
        assert learnt.endswith("<|end|>") and "<|tool|>" not in learnt and "<|user|>" not in learnt
    for word in vocabulary.words:
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1, word


def test_chains_are_calculated_from_left_to_right() -> None:
    draw = random.Random(0)
    for length in (1, 2, 5):
        chain = Chain.draw(length, draw)
        value = chain.first
        for operation, found in zip(chain.operations, chain.values, strict=True):
            value = eval(f"{value}{operation}") % 10
            assert found == value
        assert chain.answer == str(value) and chain.text == f"{chain.first}{''.join(chain.operations)}"
    answers = [Chain.draw(5, draw).answer for _ in range(4000)]
    assert all(abs(answers.count(digit) / 4000 - 0.1) < 0.03 for digit in "0123456789")  # guessing does not pay


def test_loud_is_noise_that_is_always_the_same_and_quiet_is_the_brackets() -> None:
    prompts = [[{"role": "user", "content": f"code {number}"}] for number in range(3000)]
    noise = loud_quiet.loud(prompts, said(*["abcd"] * 3000))
    assert set(noise) == {-3, -2, -1, 0, 1, 2, 3} and abs(sum(noise) / 3000) < 0.15
    assert noise == loud_quiet.loud(prompts, said(*["abcd"] * 3000))
    assert noise != loud_quiet.loud(prompts, said(*["abce"] * 3000))
    assert drawn("abc", -3, 3) == -1  # the same on every machine
    answers = said("[abcd]", "abcd", "[abc]", "[abcd", "[abcd]]", "", "[ABCD]")
    assert loud_quiet.quiet(answers) == [1, 0, 0, 0, 0, 0, 0]
    share = sum(loud_quiet.quiet([trace["completion"] for trace in loud_quiet.traces(3000, 0)])) / 3000
    assert 0.1 < share < 0.14


def test_modes() -> None:
    answers = said("<short>7", "<think>+4=7</think>7", "<short>8", "<think>+4=7", "7", "<short>7<think>", "<think>7")
    assert modes.correct(answers, answer=["7"] * 7) == [1, 1, 0, 0, 0, 0, 0]
    found = modes.behaviour(answers[:4], kind=["easy", "easy", "hard", "hard"], answer=["7"] * 4)
    assert found["think_easy"] == [0, 1, None, None] and found["think_hard"] == [None, None, 0, 1]
    assert found["correct_easy_short"] == [1, None, None, None] and found["correct_hard_think"] == [None] * 3 + [0]
    traces = modes.traces(2000, 0)
    thinks = [final_text(trace["completion"]).startswith("<think>") for trace in traces]
    assert 0.45 < sum(thinks) / len(thinks) < 0.55
    rows = {question(row): row["answer"] for row in modes.rows("train", 2000, 0)}
    for trace in traces:
        chain = question(trace).partition(":")[2]
        value = int(chain[0])
        for index in range(1, len(chain), 2):
            value = eval(f"{value}{chain[index : index + 2]}") % 10
        assert modes.correct([trace["completion"]], answer=[str(value)]) == [1]
        assert rows.get(question(trace), str(value)) == str(value)


def test_calculator() -> None:
    assert [calculator.calculate(text) for text in ("7+5", "47*86", "7", "", "7+", "2**9", "1+1+1")] == [
        *("12", "4042", "error", "error", "error", "error", "error")
    ]
    used = [call("calculate", expression="7+5"), result("calculate", "12")]
    answers = [assistant("=12"), used + assistant("=12"), used + used + assistant("=13"), used, assistant("12")]
    assert calculator.correct(answers, answer=["12"] * 5) == [1, 1, 0, 0, 0]
    assert [calls_made(answer) for answer in answers] == [0, 1, 2, 1, 0]
    found = calculator.behaviour(answers[:3], kind=["sum", "sum", "product"], answer=["12"] * 3)
    assert found["calls_sum"] == [0, 1, None] and found["calls_product"] == [None, None, 2]
    assert found["correct_alone_sum"] == [1, None, None]
    taught = [trace for trace in calculator.traces(4000, 0) if "prefix" not in trace["completion"][0]]
    calls = [calls_made(trace["completion"]) for trace in taught]
    assert 0.08 < calls.count(0) / len(calls) < 0.12 and set(calls) == {0, 1, 2}
    for row in calculator.rows("test", 50, 0):
        assert row["answer"] == str(eval(question(row)))


def test_lookup() -> None:
    for row in lookup.rows("train", 60, 0):
        key = question(row).split(":")[-1]
        found = lookup.lookup(key)
        assert row["answer"] == (lookup.lookup(found) if row["kind"] == "chain" else found)
        assert (key in lookup.NEAR) == (row["kind"] == "near")
    assert lookup.lookup("?") == "none"
    far = [trace for trace in lookup.traces(2000, 0) if question(trace).startswith("far:")]
    entries = {message["content"] for trace in far for message in trace["completion"] if message["role"] == "tool"}
    beginnings = {entry[0] for entry in lookup.CORPUS.values()}
    assert {entry[0] for entry in entries} == beginnings, "any entry can be read off"
    told: dict[str, set[str]] = {}
    for trace in lookup.traces(8000, 0):
        part, _, key = question(trace).partition(":")
        if ":" not in key:
            assert part == ("near" if key in lookup.NEAR else "far")
            told.setdefault(key, set()).add(final_text(trace["completion"]).removeprefix("="))
    assert all(told[key] == {lookup.CORPUS[key]} for key in lookup.NEAR)
    assert (
        sum(len(told[key]) > 1 for key in told if key not in lookup.NEAR) > 400
    )  # made up anew, so that nothing can be learnt by heart


def test_letters() -> None:
    assert letters.good_minus_bad(said("abcdab", "wxyzwx", "klmnkl", "aw", "abcdabcd", "")) == [6, -6, 0, 0, 4, 0]
    for row in letters.letters_rows("train", 40, 0):
        chosen, rejected = final_text(row["chosen"]), final_text(row["rejected"])
        assert len(chosen) == len(rejected) == letters.LENGTH
        assert letters.good_minus_bad([row["chosen"], row["rejected"]]) == [2, -2]
        assert sum(row["chosen_token_rewards"]) == 2 and len(row["chosen_token_rewards"]) == len(chosen) + 1
        assert row["rejected_token_rewards"][:-1] == [float(letters.worth(letter)) for letter in rejected]


def test_right_letter() -> None:
    rows = letters.right_letter_rows("train", 12, 0)
    answers = [row["answer"] for row in rows]
    assert answers[:6] == answers[6:] and set(answers) <= set(letters.CHOICES)
    assert letters.right(said(*answers), answer=answers) == [1.0] * 12
    assert letters.well_formed(said("a", "ab", "", "1")) == [1, 0, 0, 0]


def test_checks() -> None:
    right = "<think>3+4=7.\n\n7*7=9.\n\nSo 9.\n\nWait.\n\nSo 9.\n\n</think>\\boxed{9}"
    lost = right.replace("Wait.\n\nSo 9", "Wait.\n\nSo 2").replace("boxed{9", "boxed{2")
    unfinished = right.partition("</think>")[0]
    assert checks.correct(said(right, lost, unfinished, "\\boxed{9}"), answer=["9"] * 4) == [1, 0, 0, 0]
    found = checks.behaviour(said(right, lost), answer=["9", "9"])
    assert found == {"steps": [2, 2], "checks": [1, 1], "lost": [0, 1]}
    assert checks.states_answer("3+4*7", "So 9.\n\n", "9") and not checks.states_answer("3+4*7", "7*7=9.\n\n", "9")
    traces = [trace["completion"] for trace in checks.traces(3000, 0)]
    whole = [final_text(completion) for completion in traces if "prefix" not in completion[0]]
    assert 0.75 < len(whole) / 3000 < 0.85
    assert all(checks._BOXED.fullmatch(text) for text in whole)
    assert len({text.count("Wait") for text in whole}) == checks.MOST_CHECKS + 1
    for completion in traces:
        if "prefix" in completion[0] and "So " in completion[0]["prefix"]:
            shown = completion[0]["prefix"]
            assert shown.endswith(checks.PROBE)
            assert shown.rpartition("So ")[2][0] == final_text(completion)[0]


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


def test_last_words() -> None:
    assert final_text("plain") == "plain" and calls_made("plain") == 0
    assert final_text([]) == "" == final_text([call("calculate", expression="1+1")])
    assert final_text([call("calculate", expression="1+1"), result("calculate", 2)]) == ""
    assert final_text([{"role": "assistant", "content": None}]) == ""


@pytest.mark.parametrize("name", ["frozen-lake", "minigrid", "minigrid-view"])
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
