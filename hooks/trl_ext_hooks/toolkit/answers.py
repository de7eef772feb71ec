"""Right answers in a column of the data: read as text, or refused where a column holds something else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from ..plugin import UsageError
from ..setup import Config, Refuse

_LONG = 100
"""More characters than this are taken for more than an answer."""
_WORDY = 12
"""So many words are taken for more than an answer."""


def answer_text(value: Any) -> str | None:
    """Returns the final answer as a model would write it, or None where there is none.

    Texts lose spaces around them, and a `$...$` or `\\boxed{...}` that holds all of them. Whole numbers become digits,
    also where they are stored as floats, as they are in columns with holes.

    Raises:
        ValueError: The value is no final answer: a list or another structure, a number with a fraction, which can be
            written in several ways, or a whole solution.
    """
    if getattr(value, "ndim", None) == 0:  # numbers of numpy and torch, which data sets can be asked for
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if not value.is_integer():
            raise ValueError(f"{value!r}, a number that can be written in several ways")
        return str(int(value))
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{_short(value)}, which is of the type {type(value).__name__}")
    text = _unwrapped(value.strip())
    if "####" in text or "\\boxed" in text:
        raise ValueError(f"{_short(value)}, which is a whole solution")
    return text or None


def row_answer(row: Mapping[str, Any], column: str) -> str | None:
    """Returns the final answer of a row of the data; see `answer_text`.

    Raises:
        UsageError: The column holds no final answer.
    """
    try:
        return answer_text(row.get(column))
    except ValueError as error:
        raise UsageError(_complaint(column, str(error))) from error


def answer_requirements(config: Config, column: str, option: str) -> Iterator[Refuse]:
    """Yields for `configure` what refuses a column that holds no final answers, as far as the first rows show it.

    Args:
        config: As `configure` gets it.
        column: The column.
        option: Full name of the option that holds the column, for the error.
    """
    fix = f"Make a column with the final answer alone, as text such as '72', and set {option} to its name."
    rows = config.first_rows(column)
    answers: list[str] = []
    for row in rows:
        try:
            answer = answer_text(row[column])
        except ValueError as error:
            yield Refuse(_complaint(column, str(error)), fix)
            return
        if answer is not None:
            answers.append(answer)
    long = [answer for answer in answers if _is_long(answer)]
    if rows and not answers:
        yield Refuse(f"the column {column!r} is empty in the first {len(rows)} rows of the data.", fix)
    elif 2 * len(long) > len(answers):
        yield Refuse(_complaint(column, f"{_short(long[0])}, which is longer than a final answer"), fix)


def _complaint(column: str, what: str) -> str:
    """Returns the sentence of an error."""
    return f"the column {column!r} should hold final answers, and it holds {what}."


def _unwrapped(text: str) -> str:
    """Returns what is inside `$...$` or `\\boxed{...}`, where one of them holds the whole text."""
    if text.startswith("\\boxed{") and text.endswith("}"):
        inside = text[len("\\boxed{") : -1]
    elif len(text) > 2 and text[0] == text[-1] == "$":
        inside = text[1:-1]
    else:
        return text
    depths = accumulate((letter == "{") - (letter == "}") for letter in inside)
    whole = "$" not in inside and min(depths, default=0) >= 0  # not two of them side by side
    return _unwrapped(inside.strip()) if whole else text


def _is_long(text: str) -> bool:
    """Returns whether a text looks like a solution. Commands of LaTeX are not words."""
    return "\n" in text or len(text) > _LONG or len(re.findall(r"(?<!\\)\b[^\W\d_]{2,}", text)) >= _WORDY


def _short(value: Any) -> str:
    """Returns a value as Python shows it, its middle left out where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:35]} ... {text[-20:]}"
