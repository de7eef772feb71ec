"""Judges: does a piece of reasoning already state the right answer?

    judge = make_judge("match")                                        # the answer's text occurs
    judge = make_judge("math")                                         # equal as mathematics, by math-verify
    judge = make_judge("my_package.my_module:my_function")             # questions -> verdicts
    judge = make_judge(HttpJudge(url="http://localhost:8000/v1", model="my-judge"))
    verdicts, calls = ask(judge, [Question("2 + 2 = ?", "That makes 4.", "4")])

A judge takes a list of questions and returns one verdict for each: True, False, or None where it has none. What to do
about None is up to who asks; it is never taken for True or False here.
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from ..plugin import option
from ..trainer import TrainerView


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

PROMPT = """Below are a problem, one segment of somebody's reasoning about it, and the right answer. Does the segment \
itself state a final answer that means the same as the right answer? Reply with one word, yes or no.

Problem:
{problem}

Segment:
{text}

Right answer: {answer}"""


class JudgeError(RuntimeError):
    """A judge cannot work. The text says why and what to do."""


@dataclass(frozen=True)
class HttpJudge:
    """A language model behind an OpenAI-compatible server, such as `vllm serve`, that replies yes or no."""

    url: str = option(help="base address, up to and with /v1")
    model: str = option(help="the model's name at the server")
    endpoint: Literal["chat", "completions"] = option(
        "chat", help="chat asks one question a request; completions asks batch_size at once", source="ours"
    )
    batch_size: int = option(32, help="questions in one request to the endpoint completions", source="ours")
    workers: int = option(16, help="requests under way at a time", source="ours")
    timeout: float = option(60.0, help="seconds to wait for a reply", source="ours")
    retries: int = option(3, help="further attempts after a failure, each after twice the pause", source="ours")
    pause: float = option(1.0, help="seconds before the first further attempt", source="ours")
    max_tokens: int = option(5, help="tokens of the reply; more for a judge that thinks first", source="DECS' code")
    prompt: str = option(PROMPT, help="the question, with {problem}, {text} and {answer}", source="ours")
    api_key: str = option("", help="name of the environment variable that holds the key, none by default")

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        if min(self.batch_size, self.workers, self.max_tokens) < 1 or self.retries < 0 or self.timeout <= 0:
            raise ValueError(
                "batch_size, workers and max_tokens must be at least 1, timeout above 0, retries not below"
            )
        if not all(part in self.prompt for part in ("{text}", "{answer}")):
            raise ValueError("prompt must hold {text} and {answer}")


def make_judge(source: str | HttpJudge) -> Judge:
    """The judge that a setting names.

    Args:
        source: `match`, `math`, `module:attribute` of a callable, or an `HttpJudge`.

    Raises:
        JudgeError: It cannot be had.
    """
    if isinstance(source, HttpJudge):
        return _Http(source)
    if source == "match":
        return match_judge
    if source == "math":
        return _math_judge()
    if source.startswith(("http://", "https://")):
        raise JudgeError(f"the judge {source!r} needs a model too: {{url: {source}, model: NAME}}.")
    found = load(source)
    if not callable(found):
        raise JudgeError(f"the judge {source!r} is {type(found).__name__}, expected a callable.")
    return found


def ask(judge: Judge, questions: Sequence[Question]) -> tuple[list[bool | None], int]:
    """Asks a judge, each different question once.

    Returns:
        A verdict for each question, and how many were put to the judge.

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
    """`ask` on every process at the same point, each with its own questions. Collective.

    An error on one process stops all of them, where otherwise the others would wait for it for ever.

    Args:
        unless: To stop where a verdict is missing: the setting with which the user can go on. None to return None.

    Raises:
        JudgeError: A verdict is missing, or another process failed. Other errors of the judge keep their type.
    """
    failure: Exception | None = None
    verdicts: list[bool | None] = []
    calls = 0
    try:
        verdicts, calls = ask(judge, questions)
    except Exception as error:  # raised below, once the other processes know
        failure = error
    missing = sum(verdict is None for verdict in verdicts)
    if missing and unless is not None:
        reason = getattr(judge, "failure", "") or "it returned None"
        failure = JudgeError(
            f"the judge gave no verdict on {missing} of {len(verdicts)} texts: {reason}. Set {unless} to go on without."
        )
    told = trainer.gather_objects([None if failure is None else f"{type(failure).__name__}: {failure}"])
    if failure is not None:
        raise failure
    if any(told):
        raise JudgeError(f"stopped with another process: {next(text for text in told if text)}")
    return verdicts, calls


def load(reference: str) -> Any:
    """The object behind `module:attribute`.

    Raises:
        JudgeError: It is not there.
    """
    module, colon, attribute = reference.partition(":")
    if not (module and colon and attribute):
        raise JudgeError(f"{reference!r} is not known; expected match, math, or module:attribute.")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise JudgeError(f"{reference!r} cannot be loaded: {error}") from error


# --- without a model --------------------------------------------------------------------------------------------------


def match_judge(questions: Sequence[Question]) -> list[bool | None]:
    """Whether the answer stands in the text: not as a part of a longer number or word, and not behind a minus.

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
    return re.sub(r"(?<=\d),(?=\d{3})|[\s$]", lambda found: " " if found[0].isspace() else "", text).strip()


def _math_judge() -> Judge:
    """Whether the expression that math-verify finds in the text, a boxed one or the last, equals the answer."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise JudgeError("the judge 'math' needs math-verify: pip install math-verify") from error

    def judge(questions: Sequence[Question]) -> list[bool | None]:
        # its time limits are signals, which only the main thread may have
        limit = 5 if threading.current_thread() is threading.main_thread() else None
        verdicts: list[bool | None] = []
        for question in questions:
            answer = parse(f"${question.answer}$", parsing_timeout=limit) if question.answer else []
            said = parse(question.text, parsing_timeout=limit) if answer else []
            verdicts.append(bool(verify(answer, said, timeout_seconds=limit)) if answer else None)
        return verdicts

    return judge


# --- a model behind HTTP ----------------------------------------------------------------------------------------------


def _filled(prompt: str, question: Question) -> str:
    return re.sub(r"\{(problem|text|answer)\}", lambda field: str(getattr(question, field[1])), prompt)


class _Http:
    """Puts questions to a server, several at a time. What it cannot get an answer to has the verdict None."""

    def __init__(self, settings: HttpJudge) -> None:
        self.settings = settings
        self.failure = ""  # why the last question without a verdict has none
        self._address = settings.url.rstrip("/") + (
            "/chat/completions" if settings.endpoint == "chat" else "/completions"
        )
        self._headers = {"Content-Type": "application/json"}
        if settings.api_key:
            key = os.environ.get(settings.api_key)
            if not key:
                raise JudgeError(f"the environment variable {settings.api_key!r} for the judge's key is not set.")
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, questions: Sequence[Question]) -> list[bool | None]:
        size = self.settings.batch_size if self.settings.endpoint == "completions" else 1
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        if not batches:
            return []
        with ThreadPoolExecutor(min(self.settings.workers, len(batches))) as pool:
            return [verdict for verdicts in pool.map(self._batch, batches) for verdict in verdicts]

    def _batch(self, questions: Sequence[Question]) -> list[bool | None]:
        settings = self.settings
        prompts = [_filled(settings.prompt, question) for question in questions]
        body: dict[str, Any] = {"model": settings.model, "max_tokens": settings.max_tokens, "temperature": 0}
        if settings.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompts[0]}]
        else:
            body["prompt"] = prompts
        for attempt in range(settings.retries + 1):
            if attempt:
                time.sleep(settings.pause * 2 ** (attempt - 1))
            try:
                return [self._verdict(reply) for reply in self._replies(body, len(questions))]
            except urllib.error.HTTPError as error:
                self.failure = f"{self._address} replied {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    break  # asking again will not help
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
                self.failure = f"{self._address}: {type(error).__name__}: {error}"
        return [None] * len(questions)

    def _replies(self, body: dict[str, Any], count: int) -> list[str]:
        request = urllib.request.Request(self._address, json.dumps(body).encode(), self._headers)
        timeout = self.settings.timeout
        deadline, content = time.monotonic() + timeout, b""
        with urllib.request.urlopen(request, timeout=timeout) as response:  # which limits each wait, not their sum
            while part := response.read1(1 << 16):
                content += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole reply after {timeout} seconds")
        choices = json.loads(content)["choices"]
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        if len(ordered) != count:
            raise ValueError(f"{len(ordered)} replies to {count} questions")
        return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in ordered]

    def _verdict(self, reply: str) -> bool | None:
        words = set(re.findall(r"\b(yes|no)\b", reply.rpartition("</think>")[2].lower()))
        if len(words) != 1:
            self.failure = f"the judge replied {reply[:80]!r}, expected yes or no"
            return None
        return words == {"yes"}
