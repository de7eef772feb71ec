"""What a person sees meanwhile: bars in a terminal, lines in a file, and the time that is left in both."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from trl_ext.compare import progress
from trl_ext.compare.progress import ProgressDisplay
from trl_ext.compare.runs import Run


def run(arm: str, seed: int = 1) -> Run:
    return Run(arm, seed, "grpo", {}, {}, None, {}, {"arm": arm}, ".")


def record(kind: str = "finished", error: str | None = None) -> dict[str, Any]:
    return {"status": kind, "error": error, "seconds": 30.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_goes_by_the_pace_of_this_time(clock: list[float]) -> None:
    one, two = run("one"), run("two")
    with ProgressDisplay(total=6, done=2, console=Console(file=io.StringIO())) as shown:
        assert shown.left() is None  # nothing is known yet
        shown.started(one)
        shown.started(two)
        clock[0] += 10
        shown.step(one, 5, 10)
        shown.step(two, 5, 10)
        assert shown.left() == pytest.approx(30.0)  # one run's worth in 10 s, three to go
        clock[0] += 10
        shown.ended(one, record())
        assert shown.left() == pytest.approx(20 / 1.5 * 2.5)


def test_time_left_begins_with_what_is_expected_and_ends_with_the_pace(clock: list[float]) -> None:
    console = Console(file=io.StringIO())
    with ProgressDisplay(10, 2, console, {"one": 20.0, "two": 40.0}, at_once=2) as shown:
        assert shown.left() == pytest.approx(30.0 * 8 / 2)
        for number in range(4):  # twice as fast as expected
            shown.started(run("one", number))
            clock[0] += 7.5
            shown.ended(run("one", number), record())
        assert shown.left() == pytest.approx((30.0 + 30.0) / (4 + 2) * 4)
    with ProgressDisplay(1, 0, console, {"one": 20.0}, at_once=8) as shown:
        assert shown.left() == pytest.approx(20.0)  # one run keeps one process busy


def test_lines_in_a_file(clock: list[float]) -> None:
    out = io.StringIO()
    with ProgressDisplay(total=2, done=0, console=Console(file=out)) as shown:
        for arm, entry in (("one", record()), ("two", record("crashed", "out of memory"))):
            clock[0] += 10
            shown.started(run(arm))
            shown.step(run(arm), 1, 2)
            shown.tick()  # too soon for another line
            shown.ended(run(arm), entry)
    assert out.getvalue().splitlines() == [
        "[1/2] one, seed 1: starting",
        "[1/2] one, seed 1: finished in 0:30, 0:10 left",
        "[2/2] two, seed 1: starting",
        "[2/2] two, seed 1: crashed in 0:30: out of memory",
    ]


def test_a_file_gets_a_narrow_line_now_and_then_about_runs_that_go_on(clock: list[float]) -> None:
    out = io.StringIO()
    with ProgressDisplay(total=9, done=0, console=Console(file=out)) as shown:
        for seed in range(1, 7):
            shown.started(run("long-name", seed))
        before = len(out.getvalue().splitlines())
        clock[0] += progress.LINE_EVERY
        shown.step(run("long-name", 1), 5, 10)
        shown.tick()
        shown.tick()
    (line,) = out.getvalue().splitlines()[before:]
    assert line == "0/9 done, 5 starting, 4:15 left; long-name, seed 1: step 5/10, 5 more" and len(line) <= 80


def test_bars_in_a_terminal() -> None:
    out = io.StringIO()
    with ProgressDisplay(total=4, done=1, console=Console(file=out, force_terminal=True, width=80)) as shown:
        shown.started(run("two"))
        shown.started(run("one"))
        shown.step(run("one"), 3, 10)
        shown.progress.refresh()
    for words in ("all runs", "1/4 done, 1 starting", " left", "one, seed 1", "step 3/10"):
        assert words in out.getvalue()
