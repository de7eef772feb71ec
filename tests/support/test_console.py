"""Messages and lines: wrapped between words in a terminal, as they are in a pipe, without colour there."""

from __future__ import annotations

import io
import sys

import pytest

from trl_ext.support import console

LONG = "error: " + "several words of a message " * 8 + "[red]--set a_plugin.an_option=VALUE[/y]"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_gets_messages_wrapped_at_its_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stderr", Terminal())
    console.tell(LONG)
    console.print_line(" " + LONG, "problem:", "red", stderr=True)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    lines = text.replace("\x1b[31m", "").replace("\x1b[0m", "").splitlines()
    assert len(lines) > 2 and max(map(len, lines)) <= width
    assert [word for line in lines for word in line.split()] == [*LONG.split(), "problem:", *LONG.split()]


def test_a_pipe_gets_messages_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    console.tell(LONG)
    console.print_line(LONG, "mark ", "red", stderr=True)
    assert sys.stderr.getvalue() == f"{LONG}\nmark {LONG}\n"  # type: ignore[attr-defined]


def test_lists_keep_their_indentation() -> None:
    text = "this run cannot work:\n  - one two three four\n  - five"
    assert console.wrap(text, 14) == "this run\ncannot work:\n  - one two\n    three four\n  - five"


def test_bars_show_in_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress_bar("rounds") as advance:
        advance(1, 2)
    assert capsys.readouterr().err == ""
    stream = io.StringIO()
    with console.bars(console.console(file=stream, color=True, width=80)) as bars:
        bars.add_task("[red]rounds[/y]", total=2, note="[1/2]")
        bars.refresh()
    assert "[red]rounds[/y]" in stream.getvalue() and "[1/2]" in stream.getvalue()
