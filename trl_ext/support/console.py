"""Consoles that print every text literally: brackets are brackets and never markup of rich.

Whatever the commands print goes through here or through plain `print`. Rich would otherwise read `[red]` in an option,
a path or an error as a style and swallow it, or stop at `[/x]`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


def console(*, stderr: bool = False, file: IO[str] | None = None, width: int | None = None) -> Console:
    """Makes a console that takes texts literally."""
    return Console(stderr=stderr, file=file, width=width, markup=False, highlight=False, emoji=False)


def print_line(text: str, mark: str = "", style: str = "", *, stderr: bool = False) -> None:
    """Prints a line that is never wrapped.

    Args:
        text: What the line says.
        mark: A beginning of the line that has a style.
        style: The style of the mark, such as `red`.
        stderr: Whether to print on standard error.
    """
    console(stderr=stderr).print(Text.assemble((mark, style), text), soft_wrap=True)


@contextlib.contextmanager
def status(text: str = "", output: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Shows a spinner and yields the function that changes the text beside it.

    Args:
        text: The first text.
        output: Where to show it, by default standard error.
    """
    # a spinner reads markup whatever its console does, so it gets texts that are built already
    with (output or console(stderr=True)).status(Text(text)) as spinner:
        yield lambda changed: spinner.update(Text(changed))


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar on standard error and yields the function that takes finished and total steps."""
    with Progress(console=console(stderr=True)) as bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda finished, total: bar.update(task, completed=finished, total=total)


@contextlib.contextmanager
def working(text: str, about: float) -> Iterator[None]:
    """Shows in a terminal a bar for work that takes about so many seconds and reports no steps.

    Args:
        text: What is done.
        about: The seconds that it usually takes.
    """
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
