"""Judges: does a piece of reasoning already state the right answer?

    judge = make_judge("match")                                        # the answer's text occurs
    judge = make_judge("math")                                         # equal as mathematics, by math-verify
    judge = make_judge("my_package.my_module:my_function")             # questions -> verdicts
    verdicts, calls = ask(judge, [Question("2 + 2 = ?", "That makes 4.", "4")])

A judge takes a list of questions and returns one verdict for each: True, False, or None where it has none. Whoever asks
decides what to do about None, which is never taken for True or False here. A language model behind a server is a judge
too: see `trl_ext_hooks.toolkit.http_judge`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..plugin import UsageError
from ..trainer import TrainerView
from .callables import call_together, load


@dataclass(frozen=True)
class Question:
    """One piece of text to judge.

    Attributes:
        problem: What was asked, as text.
        text: The piece of a completion.
        answer: The right answer.
    """

    problem: str
    text: str
    answer: str


Judge = Callable[[Sequence[Question]], "list[bool | None]"]


class JudgeSettings(Protocol):
    """Settings of a judge that more than a name describes, such as `HttpJudge`."""

    def make(self) -> Judge:
        """Makes the judge."""


class JudgeError(RuntimeError):
    """A judge cannot work. The text says why and what to do."""


def make_judge(source: str | JudgeSettings) -> Judge:
    """Makes the judge that a setting names.

    Args:
        source: `match`, `math`, `module:attribute` of a callable, or settings such as an `HttpJudge`.

    Raises:
        JudgeError: There is no such judge, or it lacks something.
    """
    if not isinstance(source, str):
        return source.make()
    if source == "match":
        return match_judge
    if source == "math":
        return _math_judge()
    if source.startswith(("http://", "https://")):
        raise JudgeError(f"the judge {source!r} needs a model too: {{url: {source}, model: NAME}}.")
    if not {":", "."} & set(source):
        raise JudgeError(f"{source!r} is not known; expected match, math, or module:attribute.")
    try:
        judge: Judge = load(source)
    except UsageError as error:
        raise JudgeError(f"the judge {error}.") from error
    return judge


def ask(judge: Judge, questions: Sequence[Question]) -> tuple[list[bool | None], int]:
    """Asks a judge; a question that occurs several times is put to it once.

    Returns:
        A verdict for each question, and how many questions the judge got.

    Raises:
        JudgeError: The judge broke its contract.
    """
    different = list(dict.fromkeys(questions))
    verdicts = list(judge(different)) if different else []
    wrong = [verdict for verdict in verdicts if verdict is not None and not isinstance(verdict, bool)]
    if len(verdicts) != len(different) or wrong:
        got = f"a verdict {wrong[0]!r}" if wrong else f"{len(verdicts)} verdicts"
        raise JudgeError(
            f"the judge returned {got} for {len(different)} questions, expected True, False or None for each."
        )
    known = dict(zip(different, verdicts, strict=True))
    return [known[question] for question in questions], len(different)


def ask_together(
    trainer: TrainerView, judge: Judge, questions: Sequence[Question], *, unless: str | None = None
) -> tuple[list[bool | None], int]:
    """Asks on every process at the same point, each with its own questions. Collective.

    An error on one process stops all of them. Otherwise the others would wait for it for ever.

    Args:
        trainer: The trainer.
        judge: The judge.
        questions: The questions of this process.
        unless: The setting that lets a run go on without a verdict; named in the error where one is missing. With None
            a missing verdict is returned as None.

    Raises:
        JudgeError: A verdict is missing, or another process failed. Other errors of the judge keep their type.
    """

    def asked() -> tuple[list[bool | None], int]:
        verdicts, calls = ask(judge, questions)
        missing = sum(verdict is None for verdict in verdicts)
        if missing and unless is not None:
            reason = getattr(judge, "failure", "") or "it returned None"
            raise JudgeError(
                f"the judge gave no verdict on {missing} of {len(verdicts)} texts: {reason}. Set {unless} to go on "
                f"without."
            )
        return verdicts, calls

    return call_together(trainer, asked, JudgeError)


def match_judge(questions: Sequence[Question]) -> list[bool | None]:
    """Tells whether the answer occurs in the text, but not inside a longer number or word, nor behind a minus.

    Spaces, dollar signs and commas between digits do not matter. Without an answer there is no verdict.
    """
    return [_occurs(question) for question in questions]


def _occurs(question: Question) -> bool | None:
    answer, text = _plain(question.answer), _plain(question.text)
    if not answer:
        return None
    before = r"(?<![\w.\-])" if answer[0].isalnum() else ""
    after = r"(?!\w|\.\d)" if answer[-1].isalnum() else ""
    return re.search(before + re.escape(answer) + after, text) is not None


def _plain(text: str) -> str:
    """Returns the text without dollar signs and thousands separators, with plain spaces."""
    return re.sub(r"(?<=\d),(?=\d{3})|[\s$]", lambda match: " " if match[0].isspace() else "", text).strip()


def _math_judge() -> Judge:
    """Makes a judge that compares the expression in the text, a boxed one or the last, with the answer."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise JudgeError("the judge 'math' needs math-verify: pip install math-verify") from error

    def judge(questions: Sequence[Question]) -> list[bool | None]:
        # math-verify's time limits are signals, which only the main thread can set
        limit = 5 if threading.current_thread() is threading.main_thread() else None
        verdicts: list[bool | None] = []
        for question in questions:
            answer = parse(f"${question.answer}$", parsing_timeout=limit) if question.answer else []
            said = parse(question.text, parsing_timeout=limit) if answer else []
            verdicts.append(bool(verify(answer, said, timeout_seconds=limit)) if answer else None)
        return verdicts

    return judge
