"""Measures: how the logged values of one run become one number. Pure: steps and values in, a number out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Kind = Literal["final", "mean", "max", "min", "steps_to", "steps_down_to"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Direction = Literal["higher", "lower"]
WINDOW = 5
"""Logged values over which `steps_to` averages, where the recipe gives no `window`."""


@dataclasses.dataclass(frozen=True)
class Value:
    """What a measure gives for one run.

    Attributes:
        value: The number.
        censored: The level was never reached, and the number is the last step + 1, a lower bound.
    """

    value: float
    censored: bool = False


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a curve becomes a number.

    Attributes:
        kind: `final`: mean of the last `window` values (a tenth of them by default); `mean`, `max`, `min` of all;
            `steps_to`: first step at which the mean of the last `window` values is at least `level`, `steps_down_to`:
            at most `level`.
        level: The value to reach.
        window: Number of logged values.
        arm: In place of `level`, the arm whose end is to be reached, seed by seed (see `end` and `to`).
    """

    kind: Kind
    level: float | None = None
    window: int | None = None
    arm: str | None = None

    def __str__(self) -> str:
        if self.counts_steps:
            goal = f"the end of {self.arm}" if self.level is None else f"{self.level:g}"
            return f"{self.kind.replace('_', ' ')} {goal}"
        return self.kind if self.window is None else f"{self.kind} {self.window}"

    @property
    def counts_steps(self) -> bool:
        """Whether the number is a step, so that lower is better."""
        return self.kind in ("steps_to", "steps_down_to")

    @property
    def good_direction(self) -> Direction:
        """Whether high or low numbers are good, where a recipe does not say."""
        return "lower" if self.counts_steps else "higher"

    def end(self, values: Sequence[float]) -> float:
        """Returns what a run ends with: the mean of its last `window` values."""
        last = values[-(self.window or WINDOW) :]
        return math.fsum(last) / len(last)

    def to(self, level: float) -> Measure:
        """Returns the same measure with a level in place of an arm."""
        return dataclasses.replace(self, level=level, arm=None)

    def of(self, steps: Sequence[int], values: Sequence[float], last_step: int) -> Value:
        """Measures one run. A measure with an arm needs its level first (`to`).

        Args:
            steps: Steps of the logged values, in order.
            values: The logged values, at least one.
            last_step: The number of steps of the run.
        """
        if self.counts_steps:
            return self._steps_until(steps, values, last_step)
        if self.kind == "final":
            width = self.window or max(1, len(values) // 10)
            return Value(math.fsum(values[-width:]) / len(values[-width:]))
        if self.kind == "mean":
            return Value(math.fsum(values) / len(values))
        return Value(max(values) if self.kind == "max" else min(values))

    def _steps_until(self, steps: Sequence[int], values: Sequence[float], last_step: int) -> Value:
        assert self.level is not None
        width = self.window or WINDOW
        for end in range(width, len(values) + 1):
            mean = math.fsum(values[end - width : end]) / width
            if mean >= self.level if self.kind == "steps_to" else mean <= self.level:
                return Value(float(steps[end - 1]))
        return Value(float(last_step + 1), censored=True)


def series(history: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and finite values of a logged metric, in order. Missing and NaN values are left out."""
    points = [(int(entry.get("step", 0)), entry[name]) for entry in history if entry.get(name) is not None]
    points = [(step, float(value)) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]
