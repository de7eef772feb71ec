"""Tables for terminals, pipes and files: a reader of a pipe gets every word on one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import IO


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", file: IO[str] | None = None
) -> None:
    """Prints rows under column names (none, if all are empty); text is taken literally."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = file or sys.stdout
    table = Table(box=box.SIMPLE_HEAD)
    table.show_header = any(columns)
    for index, column in enumerate(columns):
        longest = max((len(word) for row in rows for word in row[index].split()), default=1)
        table.add_column(Text(column), overflow="fold", min_width=min(longest, 24))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=stream, highlight=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(file=stream, highlight=False, emoji=False, width=max(80, _width(columns, rows)))
    if title:
        console.print(Text(title), soft_wrap=True)
    console.print(table)


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    return 2 + sum(max(len(line) for cell in column for line in cell.split("\n")) + 3 for column in cells)
