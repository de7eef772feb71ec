"""A model behind a real HTTP server that misbehaves in every way."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import trl_ext
from trl_ext.catalog.options import coerce
from trl_ext_hooks.toolkit.http_judge import HttpJudge
from trl_ext_hooks.toolkit.judges import JudgeError, Question, make_judge

Answer = Callable[[dict[str, Any], int], tuple[int, bytes]]


class Server(ThreadingHTTPServer):
    """Says yes where the segment holds the word right. `answer` replaces that; every request is kept."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.answer: Answer = lambda body, count: (200, reply(body))
        self.drip = 0.0
        self.closing = threading.Event()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append({"path": self.path, **body})
            server.headers.append(self.headers)
            count = len(server.requests)
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            status, content = server.answer(body, count)
        finally:
            with server.lock:
                server.at_once -= 1
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for byte in range(len(content)) if server.drip else ():
                self.wfile.write(content[byte : byte + 1])
                server.closing.wait(server.drip)
            if not server.drip:
                self.wfile.write(content)
        except OSError:  # the client has given up
            pass

    def log_message(self, *args: Any) -> None:
        pass


def says(text: str) -> str:
    return "Yes." if "right" in text.partition("Segment:")[2].partition("Right answer:")[0] else "no"


def reply(body: dict[str, Any], word: Callable[[str], Any] = says) -> bytes:
    if "messages" in body:
        choices = [{"index": 0, "message": {"content": word(body["messages"][0]["content"])}}]
    else:
        choices = [{"index": i, "text": word(prompt)} for i, prompt in enumerate(body["prompt"])][::-1]
    return json.dumps({"choices": choices}).encode()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.closing.set()
    made.shutdown()
    made.server_close()


def judge(server: Server, **settings: Any) -> Any:
    common = {"timeout": 5.0, "retries": 2, "pause": 0.01}
    return make_judge(HttpJudge(**{"url": server.url, "model": "m"} | common | settings))


QUESTIONS = [Question("p", f"{word} {i}", "1") for i, word in enumerate(["right", "wrong", "right", "bad", "right"])]
VERDICTS = [True, False, True, False, True]


def test_chat_asks_one_question_a_request(server: Server) -> None:
    assert judge(server)(QUESTIONS) == VERDICTS
    assert len(server.requests) == 5
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions" and request["model"] == "m"
        assert request["temperature"] == 0 and request["max_tokens"] == 5
    assert judge(server)([]) == [] and len(server.requests) == 5


def test_completions_take_many_questions_and_may_come_in_any_order(server: Server) -> None:
    assert judge(server, endpoint="completions", batch_size=2)(QUESTIONS) == VERDICTS
    assert sorted(len(request["prompt"]) for request in server.requests) == [1, 2, 2]
    assert {request["path"] for request in server.requests} == {"/v1/completions"}


def test_several_requests_are_under_way(server: Server) -> None:
    def slowly(body: dict[str, Any], count: int) -> tuple[int, bytes]:
        time.sleep(0.2)
        return 200, reply(body)

    server.answer = slowly
    questions = [Question("p", f"right {i}", "1") for i in range(8)]
    assert judge(server, workers=4)(questions) == [True] * 8
    assert server.most_at_once == 4


def test_braces_in_the_texts_stay(server: Server) -> None:
    judge(server)([Question("{answer}", "\\boxed{text} {problem} \\1", "{text}")])
    prompt = server.requests[0]["messages"][0]["content"]
    assert "Problem:\n{answer}\n" in prompt and "Segment:\n\\boxed{text} {problem} \\1\n" in prompt
    assert prompt.endswith("Right answer: {text}")


def test_the_key_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "open sesame")
    judge(server, api_key="JUDGE_KEY")(QUESTIONS[:1])
    assert server.headers[0]["Authorization"] == "Bearer open sesame"
    judge(server)(QUESTIONS[:1])
    assert "Authorization" not in server.headers[1]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(JudgeError, match="environment variable 'JUDGE_KEY'"):
        judge(server, api_key="JUDGE_KEY")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("yes", True),
        ("No.", False),
        ("\\boxed{yes}", True),
        ("<think>no, no</think>\n\nYes", True),
        ("maybe", None),
        ("yes and no", None),
        ("eyes", None),
        ("", None),
    ],
)
def test_replies(said: str, verdict: bool | None, server: Server) -> None:
    server.answer = lambda body, count: (200, reply(body, lambda text: said))
    asked = judge(server)
    assert asked(QUESTIONS[:1]) == [verdict]
    assert len(server.requests) == 1  # asking again would give the same
    assert (verdict is None) == ("expected yes or no" in asked.failure)


def test_failures_that_pass_are_tried_again(server: Server) -> None:
    server.answer = lambda body, count: (503, b"busy") if count < 3 else (200, reply(body))
    assert judge(server)(QUESTIONS[:1]) == [True]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "message", "tries"),
    [
        ((500, b"broken"), "replied 500", 3),
        ((429, b"slow down"), "replied 429", 3),
        ((404, b"no such model"), "replied 404", 1),
        ((200, b"<html>garbage"), "JSONDecodeError", 3),
        ((200, b"\xff\xfe"), "DecodeError", 3),
        ((200, b"[]"), "TypeError", 3),
        ((200, b'{"error": "x"}'), "KeyError: 'choices'", 3),
        ((200, b'{"choices": []}'), "0 replies to 1 questions", 3),
        ((200, b'{"choices": [7]}'), "AttributeError", 3),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "AttributeError", 3),
    ],
    ids=str,
)
def test_failures_that_stay_have_no_verdict(
    answer: tuple[int, bytes], message: str, tries: int, server: Server
) -> None:
    server.answer = lambda body, count: answer
    asked = judge(server)
    assert asked(QUESTIONS[:1]) == [None]
    assert message in asked.failure and server.url in asked.failure
    assert len(server.requests) == tries


def test_only_what_failed_has_no_verdict(server: Server) -> None:
    def some(body: dict[str, Any], count: int) -> tuple[int, bytes]:
        return (500, b"") if "right 2" in body["messages"][0]["content"] else (200, reply(body))

    server.answer = some
    assert judge(server)(QUESTIONS) == [True, False, None, False, True]


def test_slow_answers_are_given_up(server: Server) -> None:
    server.answer = lambda body, count: (server.closing.wait(30), (200, reply(body)))[1]
    start = time.monotonic()
    asked = judge(server, timeout=0.2, retries=1)
    assert asked(QUESTIONS[:1]) == [None]
    assert time.monotonic() - start < 15 and "no whole reply after 0.2 seconds" in asked.failure


def test_answers_that_never_end_are_given_up(server: Server) -> None:
    server.drip = 0.2  # a byte now and then, so that no single wait is long; 12 seconds for all of them
    start = time.monotonic()
    asked = judge(server, timeout=0.5, retries=0)
    assert asked(QUESTIONS[:1]) == [None]
    assert time.monotonic() - start < 6 and "no whole reply after 0.5 seconds" in asked.failure


def test_a_server_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    asked = make_judge(HttpJudge(url=f"http://127.0.0.1:{port}/v1", model="m", retries=1, pause=0.01))
    assert asked(QUESTIONS) == [None] * 5  # type: ignore[operator]
    assert "ConnectionRefusedError" in asked.failure  # type: ignore[union-attr]


def test_the_pause_doubles(server: Server) -> None:
    times: list[float] = []
    server.answer = lambda body, count: (times.append(time.monotonic()), (500, b""))[1]
    judge(server, retries=2, pause=0.1)(QUESTIONS[:1])
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] >= 0.1 and gaps[1] >= 0.2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "localhost:8000"}, "must begin with http://"),
        ({"batch_size": 0}, "batch_size: expected int, >= 1, got 0"),
        ({"workers": 0}, "workers: expected int, >= 1, got 0"),
        ({"timeout": 0.0}, "timeout: expected float, > 0, got 0.0"),
        ({"retries": -1}, "retries: expected int, >= 0, got -1"),
        ({"max_tokens": 0}, "max_tokens: expected int, >= 1, got 0"),
        ({"prompt": "{answer}?"}, "must hold"),
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any], message: str) -> None:
    """In YAML, and made in Python."""
    settings = {"url": "http://localhost/v1", "model": "m"} | wrong
    with pytest.raises(ValueError, match=message):
        coerce(settings, str | HttpJudge)
    with pytest.raises(ValueError, match=message):
        coerce(HttpJudge(**settings), str | HttpJudge)


def test_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    settings = HttpJudge(url="http://localhost/v1", model="m")  # can be read and shown without it
    with pytest.raises(JudgeError, match=r"needs the package openai: pip install 'trl_ext\[judge\]'"):
        make_judge(settings)


def test_another_key_of_the_environment_is_not_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "for another server")
    judge(server)(QUESTIONS[:1])
    assert "Authorization" not in server.headers[0]


def test_it_works_inside_a_running_event_loop(server: Server) -> None:
    """As in a notebook."""

    async def cell() -> Any:
        return judge(server)(QUESTIONS)

    assert asyncio.run(cell()) == VERDICTS


def test_errors_hold_what_the_server_said(server: Server) -> None:
    server.answer = lambda body, count: (404, b'{"error": {"message": "no model m here"}}')
    asked = judge(server)
    asked(QUESTIONS[:1])
    assert "replied 404 Not Found" in asked.failure and "no model m here" in asked.failure


def test_an_error_that_never_ends_is_given_up(server: Server) -> None:
    server.answer = lambda body, count: (500, b"x" * 100)
    server.drip = 0.2
    start = time.monotonic()
    asked = judge(server, timeout=0.5, retries=0)
    assert asked(QUESTIONS[:1]) == [None]
    assert time.monotonic() - start < 6 and "no whole reply after 0.5 seconds" in asked.failure


def test_it_stands_in_the_options_of_a_plugin() -> None:
    """As a mapping in YAML, with unknown keys refused."""
    made = coerce({"url": "http://localhost/v1", "model": "m", "timeout": 3}, str | HttpJudge)
    assert made == HttpJudge(url="http://localhost/v1", model="m", timeout=3.0)
    assert coerce("match", str | HttpJudge) == "match"
    with pytest.raises(ValueError, match="no option 'modle'"):
        coerce({"url": "http://localhost/v1", "modle": "m"}, str | HttpJudge)
    assert trl_ext.OptionError
