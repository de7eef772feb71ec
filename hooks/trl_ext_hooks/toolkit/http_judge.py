"""Judge over HTTP: a language model behind an OpenAI-compatible server that replies yes or no.

    judge = make_judge(HttpJudge(url="http://localhost:8000/v1", model="my-judge"))

It asks through the package `openai`, which is imported when the judge is made: `pip install 'trl_ext[judge]'`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from ..plugin import option
from .judges import Judge, JudgeError, Question

PROMPT = """Below are a problem, one segment of somebody's reasoning about it, and the right answer. Does the segment \
itself state a final answer that means the same as the right answer? Reply with one word, yes or no.

Problem:
{problem}

Segment:
{text}

Right answer: {answer}"""


@dataclass(frozen=True)
class HttpJudge:
    """A language model behind an OpenAI-compatible server, such as `vllm serve`, that replies yes or no."""

    url: str = option(help="base address, up to and with /v1")
    model: str = option(help="the model's name at the server")
    endpoint: Literal["chat", "completions"] = option(
        "chat", help="chat asks one question per request; completions asks batch_size at once", source="ours"
    )
    batch_size: int = option(32, ge=1, help="questions in one request to the endpoint completions", source="ours")
    workers: int = option(16, ge=1, help="requests under way at a time", source="ours")
    timeout: float = option(60.0, gt=0, help="seconds within which the whole reply must arrive", source="ours")
    retries: int = option(3, ge=0, help="further attempts after a failure, each after twice the pause", source="ours")
    pause: float = option(1.0, ge=0, help="seconds before the first further attempt", source="ours")
    max_tokens: int = option(
        5, ge=1, help="tokens of the reply; more for a judge that thinks first", source="authors' code of DECS"
    )
    prompt: str = option(PROMPT, help="the question, with {problem}, {text} and {answer}", source="ours")
    api_key: str = option("", help="name of the environment variable that holds the key, none by default")

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")
        if not all(field in self.prompt for field in ("{text}", "{answer}")):
            raise ValueError("prompt must hold {text} and {answer}")

    def make(self) -> Judge:
        """Makes the judge.

        Raises:
            JudgeError: The package `openai` or the key is missing.
        """
        return _HttpJudge(self)


class _HttpJudge:
    """Puts questions to a server, several at a time. A question that gets no usable reply has the verdict None.

    Attributes:
        failure: Why the last question without a verdict has none.
    """

    def __init__(self, settings: HttpJudge) -> None:
        try:
            import openai
        except ImportError as error:
            raise JudgeError("a judge over HTTP needs the package openai: pip install 'trl_ext[judge]'") from error
        self.failure = ""
        self._openai = openai
        self._settings = settings
        path = "chat/completions" if settings.endpoint == "chat" else "completions"
        self._address = f"{settings.url.rstrip('/')}/{path}"
        # Without a key of its own the judge must not send the one in OPENAI_API_KEY to somebody else's server.
        self._key, self._headers = "none", {"Authorization": openai.Omit()}
        if settings.api_key:
            self._key, self._headers = os.environ.get(settings.api_key, ""), {}
            if not self._key:
                raise JudgeError(f"the environment variable {settings.api_key!r} for the judge's key is not set.")

    def __call__(self, questions: Sequence[Question]) -> list[bool | None]:
        size = self._settings.batch_size if self._settings.endpoint == "completions" else 1
        batches = [questions[start : start + size] for start in range(0, len(questions), size)]
        if not batches:
            return []
        # An event loop may run in this thread already, as in a notebook.
        with ThreadPoolExecutor(1) as thread:
            verdicts = thread.submit(asyncio.run, self._ask_all(batches)).result()
        return [verdict for batch in verdicts for verdict in batch]

    async def _ask_all(self, batches: Sequence[Sequence[Question]]) -> list[list[bool | None]]:
        slots = asyncio.Semaphore(self._settings.workers)
        # Retries are ours: a reply that is no verdict is asked for again too.
        async with self._openai.AsyncOpenAI(
            base_url=self._settings.url, api_key=self._key, timeout=None, max_retries=0
        ) as client:
            return await asyncio.gather(*(self._ask(client, slots, batch) for batch in batches))

    async def _ask(self, client: Any, slots: asyncio.Semaphore, questions: Sequence[Question]) -> list[bool | None]:
        """Asks one request's questions, again after a failure that may pass."""
        settings = self._settings
        async with slots:
            for attempt in range(settings.retries + 1):
                if attempt:
                    await asyncio.sleep(settings.pause * 2 ** (attempt - 1))
                try:
                    replies = await self._replies(client, questions)
                    return [self._verdict(reply) for reply in replies]
                except TimeoutError:
                    self.failure = f"{self._address}: no whole reply after {settings.timeout} seconds"
                except self._openai.APIStatusError as error:
                    status = error.status_code
                    said = error.response.text.strip()[:200]
                    self.failure = f"{self._address} replied {status} {error.response.reason_phrase}: {said}"
                    if status < 500 and status not in (408, 429):
                        break  # asking again will not help
                except self._openai.APIConnectionError as error:
                    cause = _root_cause(error)
                    self.failure = f"{self._address}: {type(cause).__name__}: {cause}"
                except (ValueError, LookupError, TypeError, AttributeError) as error:  # the reply has another shape
                    self.failure = f"{self._address}: {type(error).__name__}: {error}"
        return [None] * len(questions)

    async def _replies(self, client: Any, questions: Sequence[Question]) -> list[str]:
        """Returns what the server says to each question of one request."""
        settings = self._settings
        prompts = [_filled(settings.prompt, question) for question in questions]
        if settings.endpoint == "chat":
            create = client.chat.completions.with_raw_response.create
            asked: dict[str, Any] = {"messages": [{"role": "user", "content": prompts[0]}]}
        else:
            create, asked = client.completions.with_raw_response.create, {"prompt": prompts}
        # A deadline for the whole reply: the client's own timeout limits each wait, not their sum.
        async with asyncio.timeout(settings.timeout):
            response = await create(
                model=settings.model,
                max_tokens=settings.max_tokens,
                temperature=0,
                extra_headers=self._headers,
                **asked,
            )
        choices = json.loads(response.content)["choices"]
        ordered = sorted(choices, key=lambda choice: choice.get("index", 0))
        if len(ordered) != len(questions):
            raise ValueError(f"{len(ordered)} replies to {len(questions)} questions")
        return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in ordered]

    def _verdict(self, reply: str) -> bool | None:
        words = set(re.findall(r"\b(yes|no)\b", reply.rpartition("</think>")[2].lower()))
        if len(words) != 1:
            self.failure = f"the judge replied {reply[:80]!r}, expected yes or no"
            return None
        return words == {"yes"}


def _filled(prompt: str, question: Question) -> str:
    """Returns the prompt with its fields filled in; braces in the texts stay as they are."""
    return re.sub(r"\{(problem|text|answer)\}", lambda field: str(getattr(question, field[1])), prompt)


def _root_cause(error: BaseException) -> BaseException:
    """Returns the error that the client wrapped, such as a refused connection."""
    if isinstance(error, BaseExceptionGroup):
        return _root_cause(error.exceptions[0])
    behind = error.__cause__ or error.__context__
    return error if behind is None else _root_cause(behind)
