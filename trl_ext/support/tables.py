"""Tables for terminals, pipes and files: a reader of a pipe gets every word of a row on one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", file: IO[str] | None = None
) -> None:
    """Prints rows under column names, brackets in them included.

    Args:
        columns: Column names. No header is printed if all are empty.
        rows: One text for each column.
        title: A line above the table.
        file: Where to print, by default standard output.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .console import console

    stream = file or sys.stdout
    table = Table(box=box.SIMPLE_HEAD)
    table.show_header = any(columns)
    for index, column in enumerate(columns):
        # words of up to 24 characters stay whole, longer ones are folded where the terminal is narrow
        longest = max((len(word) for row in rows for word in row[index].split()), default=1)
        table.add_column(Text(column), overflow="fold", min_width=min(longest, 24))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    output = console(file=stream)
    if not output.is_terminal and "COLUMNS" not in os.environ:
        output = console(file=stream, width=max(80, _width(columns, rows)))
    if title:
        output.print(Text(title), soft_wrap=True)
    output.print(table)


def duration(seconds: float) -> str:
    """Returns a duration as people read it: `75` -> `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(count: int, noun: str) -> str:
    """Returns a count with its noun: `1 step`, `2 steps`."""
    many = f"{noun}es" if noun.endswith(("s", "ch")) else f"{noun}s"
    return f"{count} {noun if count == 1 else many}"


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Returns the width at which no line of a cell is wrapped."""
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    return 2 + sum(max(len(line) for cell in column for line in cell.split("\n")) + 3 for column in cells)
