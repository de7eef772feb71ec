"""The one place that talks to the terminal: every text is printed as it is, at the width that the terminal has.

Whatever the commands print goes through here, through `tables`, or through plain `print`. Rich would otherwise read
`[red]` in an option, a path or an error as a style and swallow it, or stop at `[/x]`. No other module imports rich,
apart from `rich.text.Text`, which is never read as markup.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

NARROW = 80
"""Width of what is printed into a pipe or a file."""


def console(
    *,
    stderr: bool = False,
    file: IO[str] | None = None,
    width: int | None = None,
    color: bool | None = None,
) -> Console:
    """Makes a console that takes texts literally.

    Args:
        stderr: Whether to print on standard error.
        file: Where to print instead.
        width: The width, by default that of the terminal.
        color: Colours or none, where the stream shall not decide.
    """
    from rich.console import Console

    return Console(
        stderr=stderr,
        file=file,
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=color,
        color_system="truecolor" if color else "auto",
    )


def print_line(text: str, mark: str = "", style: str = "", *, stderr: bool = False) -> None:
    """Prints a line. A terminal gets it wrapped between words, a pipe on one line.

    Args:
        text: What the line says.
        mark: A beginning of the line that has a style.
        style: The style of the mark, such as `red`.
        stderr: Whether to print on standard error.
    """
    from rich.text import Text

    output = console(stderr=stderr)
    wrapped = wrap(mark + text, output.width) if output.is_terminal else mark + text
    output.print(Text.assemble((wrapped[: len(mark)], style), wrapped[len(mark) :]), soft_wrap=True)


def tell(message: str) -> None:
    """Prints a message on standard error. A terminal gets it wrapped between words, a pipe in lines of any length."""
    stream = sys.stderr
    print(wrap(message, terminal_width()) if stream.isatty() else message, file=stream, flush=True)


def terminal_width() -> int:
    """Returns the width of the terminal: `COLUMNS` if it is set, and 80 where there is no terminal."""
    return max(20, shutil.get_terminal_size((NARROW, 24)).columns)


def wrap(text: str, width: int) -> str:
    """Breaks lines that are too long between words. What follows is indented as the line, or as its list entry."""
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= width:
            lines.append(line)
            continue
        start = re.match(r" *(- )?", line)
        indent = " " * len(start.group() if start else "")
        lines += textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


@contextlib.contextmanager
def status(text: str = "", output: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a spinner and yields the function that changes the text beside it.

    Args:
        text: The first text.
        output: Where to show it, by default standard error.
    """
    from rich.text import Text

    # a spinner reads markup whatever its console does, so it gets texts that are built already
    with (output or console(stderr=True)).status(Text(text)) as spinner:
        yield lambda changed: spinner.update(Text(changed))


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on standard error and yields the function that takes finished and total steps."""
    with bars(console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note="")
        yield lambda finished, total: bar.update(task, completed=finished, total=total, note=f"{finished}/{total}")


@contextlib.contextmanager
def working(text: str, about: float) -> Iterator[None]:
    """Shows in a terminal a bar for work that takes about so many seconds and reports no steps.

    Args:
        text: What is done.
        about: The seconds that it usually takes.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    output = console(stderr=True)
    if not output.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=output, transient=True) as bar:
        task = bar.add_task(text, total=about)
        ended = threading.Event()

        def tick() -> None:
            while not ended.wait(1.0):
                bar.advance(task, 1.0)

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            ended.set()
            ticker.join()


def bars(output: Console) -> Progress:
    """Makes bars with a name before and a note after each. They show in a terminal only, and disappear at the end.

    Every task needs the field `note`.
    """
    from rich.progress import BarColumn, Progress, TextColumn

    # texts of a column are markup by default
    names, notes = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
    return Progress(names, BarColumn(), notes, console=output, transient=True, disable=not output.is_terminal)


def run_bar() -> Progress:
    """Makes the bar of a run: what it does, a note, and the time since it began. Its task needs the field `note`."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        console=console(stderr=True),
        transient=True,
        refresh_per_second=2,
        # lines on standard output appear above the bar, and stay where they are if they go to a file
        redirect_stdout=sys.stdout.isatty(),
    )


def plain_width() -> int:
    """Returns the width of what is printed into a pipe: `COLUMNS` if it is set, else 80."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else NARROW
