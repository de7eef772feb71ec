"""The table and the sentences of a comparison."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from trl_ext.cli import compare, main
from trl_ext.compare.text_report import interval, number

from .pages import CONTENT


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


def test_a_comparison_fails_for_what_its_recipe_does_not_state(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    content = copy.deepcopy(CONTENT) | {"complete": True, "headline": "typed"}
    expectation = content["metrics"][0]["expectations"][0]
    expectation["met"] = False
    monkeypatch.setattr(compare, "_of_recipe", lambda args: (tmp_path, content))
    assert main.main(["compare", "typed"]) == 1
    assert "recorded as" not in capsys.readouterr().out + (tmp_path / "compare.html").read_text()
    expectation["reason"] = "[too] loud"
    assert main.main(["compare", "typed"]) == 0
    assert "(not judged), recorded as not met: [too] loud" in " ".join(capsys.readouterr().out.split())
    assert "(not judged), recorded as not met: [too] loud" in (tmp_path / "compare.html").read_text()
