"""Tables for terminals, pipes and files. They fold what is too wide, and never leave anything out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import IO

_WHOLE = 24
"""Words of up to so many characters stay whole where there is room."""
_NARROWEST = 6
"""Columns are never narrower. A table that would need that is printed as a list."""
_GAP = 3
"""Characters between two columns."""


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", file: IO[str] | None = None
) -> None:
    """Prints rows under column names, brackets in them included.

    A table is as wide as the terminal, and 80 characters in a pipe, unless `COLUMNS` says otherwise. If its columns do
    not fit side by side, every row becomes a list of its cells.

    Args:
        columns: Column names. No header is printed if all are empty.
        rows: One text for each column.
        title: A line above the table.
        file: Where to print, by default standard output.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from .console import console, plain_width, wrap

    stream = file or sys.stdout
    output = console(file=stream)
    if not output.is_terminal:
        output = console(file=stream, width=plain_width())
    if title:
        print(wrap(title, output.width), file=stream)
    widths = _widths(columns, rows, output.width)
    if widths is None:
        _print_list(columns, rows, stream)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1), show_header=any(columns))
    for column, width in zip(columns, widths, strict=True):
        table.add_column(Text(column), overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if output.is_terminal:
        output.print(table)
    else:  # without the spaces at the ends of lines
        with output.capture() as capture:
            output.print(table)
        stream.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def duration(seconds: float) -> str:
    """Returns a duration as people read it: `75` -> `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Returns the widths of columns that fit side by side, with whole words as far as possible, or None."""
    from rich.cells import cell_len

    cells = [[column, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    room = width - _GAP * (len(columns) - 1)
    wanted = [max((cell_len(line) for cell in column for line in cell.split("\n")), default=1) for column in cells]
    if sum(wanted) <= room:
        return wanted
    longest = [max((cell_len(word) for cell in column for word in cell.split()), default=1) for column in cells]
    candidates = [[min(word, whole) for word in longest] for whole in range(_WHOLE, _NARROWEST - 1, -1)]
    if sum(line for line in wanted if line <= _WHOLE) <= room / 2:
        # there is enough for the long columns even if the short ones stay on one line
        whole_lines = [line if line <= _WHOLE else word for line, word in zip(wanted, candidates[0], strict=True)]
        candidates.insert(0, whole_lines)
    least = next((widths for widths in candidates if sum(widths) <= room), None)
    return None if least is None else _widened(least, wanted, room)


def _widened(widths: list[int], wanted: Sequence[int], room: int) -> list[int]:
    """Gives the room that is left, character by character, to the column that would need the most lines."""
    for _ in range(room - sum(widths)):
        lines = [line / width for line, width in zip(wanted, widths, strict=True)]
        widths[lines.index(max(lines))] += 1
    return widths


def _print_list(columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str]) -> None:
    """Prints the cells of a row below each other, and an empty line after every row."""
    for row in rows:
        print_table(["", ""], [[column, cell] for column, cell in zip(columns, row, strict=True)], file=stream)
        print(file=stream)
