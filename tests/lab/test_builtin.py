"""The built-in tasks: rows, traces, rewards and behaviour."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from trl_ext import lab
from trl_ext.lab.builtin import (
    calculator,
    checks,
    letters,
    lookup,
    loud_quiet,
    modes,
)
from trl_ext.lab.builtin.chains import Chain
from trl_ext.lab.messages import assistant, call, calls_made, final_text, hashed_integer, result
from trl_ext.lab.pictures import as_json
from trl_ext.lab.tokenizer import Vocabulary
from trl_ext.lab.trace_tokens import tokenized

TASKS = lab.tasks()
every_task = pytest.mark.parametrize(
    "task",
    [
        # pictures take long
        pytest.param(task, id=name, marks=[pytest.mark.slow] if name == "minigrid-view" else [])
        for name, task in TASKS.items()
    ],
)
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
    rows = tokenized(task, tokenizer, json.loads(json.dumps(task.traces(200, 0), default=as_json)))
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
    assert hashed_integer("abc", -3, 3) == -1  # the same on every machine
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
