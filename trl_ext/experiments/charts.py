"""Charts as SVG text: curves with bands, and the values of all seeds as dots. Pure: numbers in, text out.

A chart says how it maps numbers to places (`data-x`, `data-y`: number from, number to, pixel from, pixel to), so that
what is drawn can be read back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .curves import limits
from .results import number

WIDTH, HEIGHT = 400, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 390, 10, 206


class Scale:
    """A linear map from numbers to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high if high > low else low + 1.0
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def __str__(self) -> str:
        return f"{self.low!r} {self.high!r} {self.start!r} {self.end!r}"

    def ticks(self, about: int) -> list[float]:
        """Round numbers inside the range."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * index for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def curves(
    name: str, arms: Mapping[str, Mapping[str, Any]], classes: Mapping[str, str], level: float | None = None
) -> str:
    """A panel with the mean curve of every arm and its band.

    Args:
        name: The metric.
        arms: Arm -> curve, as `curves.collect` makes them.
        classes: Arm -> CSS class, which gives the color.
        level: A value to mark.
    """
    steps = [step for curve in arms.values() for step in curve["steps"]]
    x = Scale(min(steps), max(steps), _LEFT, _RIGHT)
    y = Scale(*limits(arms, level), _BOTTOM, _TOP)
    parts = [
        f'<svg class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} over the steps" '
        f'data-metric="{escape(name)}" data-x="{x}" data-y="{y}">'
    ]
    for tick in y.ticks(5):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(tick):.2f}" y2="{y(tick):.2f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y(tick) + 3.5:.2f}">{tick:g}</text>')
    for tick in x.ticks(6):
        parts.append(f'<text class="tick middle" x="{x(tick):.2f}" y="{_BOTTOM + 16}">{tick:g}</text>')
    parts.append(f'<text class="tick middle" x="{(_LEFT + _RIGHT) / 2}" y="{HEIGHT - 2}">step</text>')
    if level is not None:
        parts.append(f'<line class="level" x1="{_LEFT}" x2="{_RIGHT}" y1="{y(level):.2f}" y2="{y(level):.2f}"/>')
    for arm, curve in arms.items():
        if "low" in curve:
            edge = [*zip(curve["steps"], curve["low"], strict=True)]
            edge += reversed([*zip(curve["steps"], curve["high"], strict=True)])
            points = _points(edge, x, y)
            parts.append(f'<polygon class="band {classes[arm]}" data-arm="{escape(arm)}" points="{points}"/>')
    for arm, curve in arms.items():
        points = _points([*zip(curve["steps"], curve["mean"], strict=True)], x, y)
        parts.append(f'<polyline class="curve {classes[arm]}" data-arm="{escape(arm)}" points="{points}"/>')
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_BOTTOM}"/></svg>')
    return "".join(parts)


def dots(metric: Mapping[str, Any], classes: Mapping[str, str]) -> str:
    """The value of every seed as a dot, the mean as a line and its interval as a bar; a row per arm."""
    arms = {arm: found for arm, found in metric["values"].items() if found}
    if not arms:
        return ""
    every = [value for found in arms.values() for value in found.values()]
    room = 0.05 * (max(every) - min(every) or abs(max(every)) or 1.0)
    height = 24 * len(arms) + 28
    x = Scale(min(every) - room, max(every) + room, 110, _RIGHT)
    parts = [
        f'<svg class="dots" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(metric["label"])} of every '
        f'seed" data-x="{x}">'
    ]
    for tick in x.ticks(5):
        parts.append(f'<line class="grid" x1="{x(tick):.2f}" x2="{x(tick):.2f}" y1="4" y2="{height - 22}"/>')
        parts.append(f'<text class="tick middle" x="{x(tick):.2f}" y="{height - 8}">{number(tick)}</text>')
    for row, (arm, found) in enumerate(arms.items()):
        middle, color, estimate = 24 * row + 16, classes[arm], metric["estimates"][arm]
        parts.append(f'<text class="arm end {color}" x="102" y="{middle + 4}">{escape(arm)}</text>')
        if estimate["low"] is not None:
            left, right = x(estimate["low"]), x(estimate["high"])
            parts.append(
                f'<rect class="band {color}" x="{left:.2f}" y="{middle - 7}" width="{right - left:.2f}" height="14"/>'
            )
        for seed, value in found.items():
            title = f"{escape(arm)}, seed {seed}: {number(value)}"
            parts.append(
                f'<circle class="dot {color}" cx="{x(value):.2f}" cy="{middle}" r="3"><title>{title}</title></circle>'
            )
        mean = x(estimate["mean"])
        parts.append(
            f'<line class="curve {color}" x1="{mean:.2f}" x2="{mean:.2f}" y1="{middle - 9}" y2="{middle + 9}"/>'
        )
    return "".join([*parts, "</svg>"])


def _points(values: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    return " ".join(f"{x(step):.3f},{y(value):.3f}" for step, value in values)
