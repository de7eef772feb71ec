"""The table and the sentences of a comparison."""

from __future__ import annotations

import pytest

from trl_ext.compare.text_report import interval, number


@pytest.mark.parametrize(
    ("value", "text"), [(331.4, "331"), (12.0, "12"), (0.91234, "0.912"), (-0.00123, "-0.00123"), (None, "?")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_intervals() -> None:
    assert interval({"mean": 331.2, "low": 290.0, "high": 372.4}) == "331 [290, 372]"
    assert interval({"mean": 0.5, "low": None, "high": None}, signed=True) == "+0.5"
    assert interval({"mean": -0.5, "low": -1.0, "high": 0.0}, signed=True) == "-0.5 [-1, 0]"
    assert interval(None) == "none"
