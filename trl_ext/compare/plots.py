"""Plots of a comparison with matplotlib: a PNG with all mean curves, and one SVG for each chart of the page."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import verdicts
from .text_report import number

COLORS = ("#6b7280", "#2563b0", "#d9641e", "#1f8a63", "#8b52b3", "#a8841a", "#c23b5a", "#16869c")
"""One for each arm. The first arm is grey, as it is what the others are compared with."""
_INK, _GRID = "#333333", "#dddddd"
_THEME = {_INK: "var(--soft)", _GRID: "var(--line)"}
"""Color of a plot -> the page's own, which also suits a dark page."""
_WIDTH, _HEIGHT, _ROW = 400, 236, 24
_SVG: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "trl_ext", "path.simplify": False}
"""Text stays text, equal charts get equal files, and a curve keeps all its points."""
_PAGE: dict[Any, Any] = _SVG | {"xtick.labelsize": 11, "ytick.labelsize": 11, "axes.labelsize": 11}
_PICTURE: dict[Any, Any] = {"xtick.labelsize": 8, "ytick.labelsize": 8, "axes.labelsize": 9}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Scale(NamedTuple):
    """A linear map: `low` is drawn at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart for the page.

    Attributes:
        svg: What is inside the element `svg`.
        width, height: Of its view box.
        x, y: How numbers become places.
    """

    svg: str
    width: int
    height: int
    x: Scale
    y: Scale


def colors(arms: Mapping[str, Any]) -> dict[str, str]:
    """Returns the color of each arm."""
    return {arm: COLORS[index % len(COLORS)] for index, arm in enumerate(arms)}


def picture(content: Mapping[str, Any]) -> bytes:
    """Draws a PNG with a panel for each metric. Without any finished run it says so.

    Args:
        content: As in `compare.json`.
    """
    with matplotlib.rc_context(_PICTURE):
        return _picture(content)


def curve_chart(arms: Mapping[str, Mapping[str, Any]], color: Mapping[str, str], level: float | None = None) -> Chart:
    """Draws the mean curve of each arm with its band.

    Args:
        arms: Arm -> curve, as `mean_curves.collect` makes them.
        color: Arm -> color.
        level: A value to mark.
    """
    with matplotlib.rc_context(_PAGE):
        figure, panel = _figure(_HEIGHT, left=48, bottom=30)
        _draw_curves(panel, arms, color, level)
        steps = [step for curve in arms.values() for step in curve["steps"]]
        first, last = min(steps), max(steps)
        panel.set_xlim((first, last) if first < last else (first - 1, last + 1))
        return _chart(figure, panel)


def seed_chart(metric: Mapping[str, Any], color: Mapping[str, str]) -> Chart | None:
    """Draws the value of each seed as a dot, the mean as a line and its interval as a bar, in a row for each arm.

    Args:
        metric: As in `compare.json`.
        color: Arm -> color.

    Returns:
        The chart, or None where no run has a value.
    """
    arms = {arm: values for arm, values in metric["values"].items() if values}
    if not arms:
        return None
    every = [value for values in arms.values() for value in values.values()]
    room = 0.05 * (max(every) - min(every) or abs(max(every)) or 1.0)
    with matplotlib.rc_context(_PAGE):
        figure, panel = _figure(_ROW * len(arms) + 28, left=110, bottom=24)
        for row, (arm, values) in enumerate(arms.items()):
            estimate = metric["estimates"][arm]
            if estimate["low"] is not None:
                ends = [estimate["low"], estimate["high"]]
                panel.fill([*ends, *ends[::-1]], [row - 0.3] * 2 + [row + 0.3] * 2, color=color[arm], alpha=0.2, lw=0)
            panel.plot([estimate["mean"]] * 2, [row - 0.38, row + 0.38], color=color[arm], linewidth=2)
            (dots,) = panel.plot(
                [*values.values()], [row] * len(values), "o", color=color[arm], markersize=6, alpha=0.75
            )
            dots.set_gid(f"dots:{arm}")
        _tidy(panel, grid="x")
        panel.spines[:].set_visible(False)
        panel.tick_params(axis="y", labelsize=12, length=0)
        panel.set_yticks(range(len(arms)), list(arms), fontweight="bold", parse_math=False)
        for label, arm in zip(panel.get_yticklabels(), arms, strict=True):
            label.set_color(color[arm])
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.set_xlim(min(every) - room, max(every) + room)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=5))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
        return _chart(figure, panel)


def limits(arms: Mapping[str, Mapping[str, Any]], level: float | None = None) -> tuple[float, float]:
    """Returns the range of values that a panel shows: 0 to 1 for shares, else that of the values with some room."""
    values = [v for arm in arms.values() for key in ("mean", "low", "high") for v in arm.get(key, [])]
    values += [] if level is None else [level]
    low, high = min(values), max(values)
    if low >= 0 and high <= 1 and high > 0.3:
        return 0.0, 1.0
    room = 0.06 * (high - low or abs(high) or 1.0)
    return low - room, high + room


def levels(content: Mapping[str, Any]) -> dict[str, float]:
    """Returns metric -> the level that it is to reach, where the recipe asks for the steps to one."""
    return {metric["name"]: metric["level"] for metric in content["metrics"] if metric["level"] is not None}


def _picture(content: Mapping[str, Any]) -> bytes:
    """Draws the panels, with one legend for all."""
    names = list(content["curves"])
    columns = 2 if len(names) == 4 else min(max(len(names), 1), 3)
    rows = math.ceil(max(len(names), 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.9), dpi=130, layout="constrained")
    seeds = len(content["seeds"])
    runs = f"of {seeds} seeds" if content["paired"] else "over the runs of an arm"
    legend = f"mean {runs}, band: its 95% interval" if seeds > 1 else "one run each"
    title = f"{textwrap.fill(verdicts.headline(content), 52 * columns)}\n{legend}"
    figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        _draw_curves(panel, content["curves"][name], colors(content["arms"]), levels(content).get(name))
        panel.set_title(name, fontsize=10, color=_INK, parse_math=False)
        panel.margins(x=0.02)
    for panel in panels[len(names) :]:
        panel.axis("off")
    if not names:
        panels[0].text(0.5, 0.5, "no run has finished", ha="center", color=_INK)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_curves(
    panel: Axes, arms: Mapping[str, Mapping[str, Any]], color: Mapping[str, str], level: float | None
) -> None:
    """Draws mean curves and bands into a panel."""
    for arm, curve in arms.items():
        steps = curve["steps"]
        (line,) = panel.plot(steps, curve["mean"], color=color[arm], linewidth=1.8, label=arm)
        line.set_gid(f"curve:{arm}")
        if len(steps) == 1:
            line.set_marker("o")  # a line of one point would be invisible
        if "low" in curve:
            edge = [*curve["low"], *reversed(curve["high"])]
            (band,) = panel.fill([*steps, *reversed(steps)], edge, color=color[arm], alpha=0.2, linewidth=0)
            band.set_gid(f"band:{arm}")
    if level is not None:
        panel.axhline(level, color=_INK, linewidth=0.8, linestyle=":")
    panel.set_xlabel("step", color=_INK)
    panel.set_ylim(*limits(arms, level))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _tidy(panel, grid="y")


def _tidy(panel: Axes, grid: str) -> None:
    """Leaves a panel with few and light lines."""
    panel.grid(axis=grid, color=_GRID, linewidth=0.7)  # type: ignore[arg-type]
    panel.set_axisbelow(True)
    panel.tick_params(colors=_INK, length=3)
    for side, spine in panel.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side not in ("top", "right"))


def _figure(height: int, left: int, bottom: int) -> tuple[Figure, Axes]:
    """Makes a figure without a background, whose panel has fixed margins in points."""
    figure = Figure(figsize=(_WIDTH / 72, height / 72))
    figure.patch.set_visible(False)
    panel = figure.add_axes(
        (left / _WIDTH, bottom / height, (_WIDTH - left - 10) / _WIDTH, (height - bottom - 10) / height)
    )
    panel.patch.set_visible(False)
    return figure, panel


def _chart(figure: Figure, panel: Axes) -> Chart:
    """Saves a figure as SVG and takes from it what a page needs."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=_NO_METADATA)
    # without the outer element, a style that would hold for the whole page, fonts, and names that several charts share
    surplus = r"\A.*?<svg[^>]*>|</svg>\s*\Z|<style.*?</style>|<metadata.*?</metadata>|font-family: [^;\"]*;"
    svg = re.sub(surplus, "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'<g id="(?:(curve|band|dots):([^"]*)|[^"]*)"(/?)>', _group, svg)
    for color, theme in _THEME.items():
        svg = svg.replace(color, theme)
    width, height = (round(72 * inches) for inches in figure.get_size_inches())
    box = panel.get_position()
    x = (*panel.get_xlim(), width * box.x0, width * box.x1)
    y = (*panel.get_ylim(), height * (1 - box.y0), height * (1 - box.y1))
    return Chart(svg, width, height, Scale(*map(float, x)), Scale(*map(float, y)))


def _group(match: re.Match[str]) -> str:
    """Turns the name of a group into a class and the name of its arm, and drops other names."""
    attributes = f' class="{match[1]}" data-arm="{match[2]}"' if match[1] else ""
    return f"<g{attributes}{match[3]}>"
