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
        assert shown.left() == 0.0  # nothing is known yet
        shown.started(one)
        shown.started(two)
        clock[0] += 10
        shown.step(one, 5, 10)
        shown.step(two, 5, 10)
        assert shown.left() == pytest.approx(30.0)  # one run's worth in 10 s, three to go
        clock[0] += 10
        shown.ended(one, record())
        assert shown.left() == pytest.approx(20 / 1.5 * 2.5)


def test_lines_in_a_file() -> None:
    out = io.StringIO()
    with ProgressDisplay(total=2, done=0, console=Console(file=out)) as shown:
        for arm, entry in (("one", record()), ("two", record("crashed", "out of memory"))):
            shown.started(run(arm))
            shown.step(run(arm), 1, 2)
            shown.ended(run(arm), entry)
    assert out.getvalue().splitlines() == [
        "[1/2] one, seed 1: finished in 0:30, 0:00 left",
        "[2/2] two, seed 1: crashed in 0:30: out of memory",
    ]


def test_bars_in_a_terminal() -> None:
    out = io.StringIO()
    with ProgressDisplay(total=4, done=1, console=Console(file=out, force_terminal=True, width=120)) as shown:
        shown.started(run("one"))
        shown.step(run("one"), 3, 10)
        shown.progress.refresh()
    for words in ("all runs", "1/4 done", " left", "one, seed 1", "step 3/10"):
        assert words in out.getvalue()
