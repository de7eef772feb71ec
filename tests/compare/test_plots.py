"""The charts: the numbers that they draw, equal files for equal numbers, and texts that stay texts."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import processes
from trl_ext.compare import plots

from .pages import CONTENT, check_curves

COLORS = plots.colors(CONTENT["arms"])
ARMS = CONTENT["curves"]["rewards/r/mean"]


def page(name: str, chart: plots.Chart) -> str:
    scales = " ".join(f'data-{axis}="{" ".join(map(str, getattr(chart, axis)))}"' for axis in "xy")
    return f'<svg class="curves" data-metric="{name}" {scales}>{chart.svg}</svg>'


def test_the_picture() -> None:
    content = plots.picture(CONTENT)
    assert content.startswith(b"\x89PNG") and len(content) > 20_000


def test_the_title_of_the_picture_is_what_the_runs_show(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    draw = plots.Figure.suptitle
    monkeypatch.setattr(plots.Figure, "suptitle", lambda self, t, **kw: (titles.append(t), draw(self, t, **kw))[1])
    plots.picture(CONTENT)  # its expectation is not judged
    met = copy.deepcopy(CONTENT)
    met["metrics"][0]["expectations"][0]["met"] = True
    plots.picture(met)
    unproven, proven = (" ".join(title.split()) for title in titles)
    assert CONTENT["claim"] not in unproven and unproven.startswith("ours against plain: too few seeds (rewards/r/mean")
    assert proven == f"{CONTENT['claim']} mean of 2 seeds, band: its 95% interval"


def test_a_dollar_in_a_name_is_no_formula() -> None:
    name = "rewards/$x^{$/mean"
    plots.picture(CONTENT | {"claim": "costs $5 and $", "curves": {name: ARMS}})


def test_a_curve_of_one_value_can_be_drawn() -> None:
    flat = {"plain": {"steps": [5], "mean": [2.0], "runs": {"1": [2.0]}}}
    chart = plots.curve_chart(flat, COLORS)
    check_curves(page("m", chart), {"m": flat})
    assert chart.svg.count("<use") >= 1  # a point, as a line would be invisible


def test_a_chart_is_only_what_is_inside_the_element(monkeypatch: pytest.MonkeyPatch) -> None:
    for chart in (plots.curve_chart(ARMS, COLORS, 0.9), plots.seed_chart(CONTENT["metrics"][0], COLORS)):
        assert chart is not None
        for words in ("<svg", "<style", "<metadata", "<?xml", "DOCTYPE", "http", "font-family", "line2d", "#333333"):
            assert words not in chart.svg, words
        assert "var(--soft)" in chart.svg and "var(--line)" in chart.svg and "<text" in chart.svg


def test_equal_numbers_are_equal_files_in_another_process() -> None:
    code = (
        "from tests.compare.test_plots import *\n"
        "print(plots.curve_chart(ARMS, COLORS, 0.9).svg + plots.seed_chart(CONTENT['metrics'][0], COLORS).svg)"
    )
    command = [sys.executable, "-c", code]
    done = [processes.run(command, cwd=Path(__file__).parents[2]) for _ in range(2)]
    assert done[0].returncode == 0, done[0].stderr
    assert done[0].stdout == done[1].stdout and len(done[0].stdout) > 5000


def test_seeds_are_dots_at_their_values() -> None:
    chart = plots.seed_chart(CONTENT["metrics"][0], COLORS)
    assert chart is not None
    low, high, start, end = chart.x
    dots: dict[str, list[float]] = {}
    arm = ""
    for line in chart.svg.splitlines():
        if 'class="dots"' in line:
            arm = line.partition('data-arm="')[2].partition('"')[0]
        elif arm and "<use" in line:
            pixel = float(line.partition(' x="')[2].partition('"')[0])
            dots.setdefault(arm, []).append(low + (pixel - start) / (end - start) * (high - low))
    assert dots == {"plain": pytest.approx([30.0, 50.0], abs=0.01), "ours": pytest.approx([12.0], abs=0.01)}


def test_no_chart_without_a_value() -> None:
    empty: dict[str, Any] = CONTENT["metrics"][0] | {"values": {"plain": {}, "ours": {}}}
    assert plots.seed_chart(empty, COLORS) is None


@pytest.mark.parametrize(
    ("values", "level", "expected"),
    [
        ([0.0, 0.5], None, (0.0, 1.0)),
        ([0.0, 0.1], None, (-0.006, 0.106)),
        ([0.2, 0.6], 2.0, (0.2 - 0.108, 2.108)),
        ([5.0, 5.0], None, (4.7, 5.3)),
    ],
)
def test_limits(values: list[float], level: float | None, expected: tuple[float, float]) -> None:
    assert plots.limits({"a": {"mean": values}}, level) == pytest.approx(expected)
