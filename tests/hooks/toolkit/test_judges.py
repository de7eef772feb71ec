"""Judges: text, mathematics and callables."""

from __future__ import annotations

import sys
import threading
import types
from typing import Any

import pytest

from trl_ext_hooks.toolkit.judges import JudgeError, Question, ask, make_judge, match_judge

# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("that makes 4.", "4", True),
        ("that makes 4", "4", True),
        ("that makes 4.5", "4", False),
        ("that makes 14 or 41", "4", False),
        ("that makes x4", "4", False),
        ("that makes -4", "4", False),
        ("that makes -4", "-4", True),
        ("so 1,234,567 it is", "1234567", True),
        ("so 1234 it is", "1,234", True),
        ("3,4 and 5", "34", False),
        ("so $\\frac{1}{2}$.", "$\\frac{1}{2}$", True),
        ("it is (B)", "(B)", True),
        ("the  new\nanswer", "new answer", True),
        ("no", "", None),
        ("no", "  ", None),
    ],
)
def test_the_answer_stands_in_the_text(text: str, answer: str, expected: bool | None) -> None:
    assert match_judge([Question("?", text, answer)]) == [expected]


def test_math_compares_values() -> None:
    pytest.importorskip("math_verify")
    judge = make_judge("math")
    questions = [
        Question("?", "so it is $\\frac{1}{2}$.", "0.5"),
        Question("?", "\\boxed{\\frac12}", "1/2"),
        Question("?", "so it is 3.", "4"),
        Question("?", "nothing", "4"),
        Question("?", "4", ""),
    ]
    assert judge(questions) == [True, True, False, False, None]
    inside: list[Any] = []  # where its time limits cannot be set
    thread = threading.Thread(target=lambda: inside.append(judge(questions[:3])))
    thread.start()
    thread.join()
    assert inside == [[True, True, False]]


def test_math_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(JudgeError, match="pip install math-verify"):
        make_judge("math")


# --- callables and the contract ---------------------------------------------------------------------------------------


@pytest.fixture
def callables(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = types.ModuleType("judges_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_a_callable_by_name(callables: Any) -> None:
    callables.long = lambda questions: [len(question.text) > 3 for question in questions]
    assert make_judge("judges_of_a_test:long")([Question("", "four", ""), Question("", "two", "")]) == [True, False]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("judges_of_a_test:nothing", "the judge 'judges_of_a_test:nothing': .* has no function 'nothing'"),
        ("no_such_module_here:judge", "No module named 'no_such_module_here'"),
        ("mach", "'mach' is not known; expected match, math, or module:attribute"),
        ("judges_of_a_test:number", "has no function 'number'"),
        ("http://localhost:1/v1", r"needs a model too: \{url: http://localhost:1/v1, model: NAME\}"),
    ],
)
def test_what_cannot_be_a_judge(reference: str, message: str, callables: Any) -> None:
    callables.number = 1
    with pytest.raises(JudgeError, match=message):
        make_judge(reference)


def test_equal_questions_are_asked_once() -> None:
    seen: list[Question] = []

    def judge(questions: Any) -> list[bool | None]:
        seen.extend(questions)
        return [question.text == "b" for question in questions]

    a, b, c = Question("p", "a", "1"), Question("p", "b", "1"), Question("p", "a", "2")
    assert ask(judge, [a, b, a, c, b]) == ([False, True, False, False, True], 3)
    assert seen == [a, b, c]
    assert ask(judge, []) == ([], 0) and len(seen) == 3


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [([True], "returned 1 verdicts for 2 questions"), ([True, "yes"], "a verdict 'yes'"), ([1, 0], "a verdict 1")],
)
def test_a_judge_that_breaks_its_contract(verdicts: list[Any], message: str) -> None:
    with pytest.raises(JudgeError, match=message):
        ask(lambda questions: verdicts, [Question("p", "a", "1"), Question("p", "b", "1")])
