"""Layers: what tokens of a recorded round can be coloured by, and how strongly each value colours them.

A shade is how strongly something is coloured: from -1 to 1 where the sign has a meaning, else from 0 to 1, and null
where the loss does not count a token or there is no value.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

from .file_format import Recording
from .formatting import number, signed, visible

Values = list[float | None]
_STEPS = {True: (-1.0, -0.66, -0.33, -0.1, 0.0, 0.1, 0.33, 0.66, 1.0), False: (0.0, 0.25, 0.5, 0.75, 1.0)}
"""Places of the legend on the scale of a layer, with and without a sign."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Something that tokens can be coloured by.

    Attributes:
        name: Its full name.
        set: The set of layers among which it is chosen.
        short: Its name in the set.
        signed: Whether plus and minus have different colours.
        values: For every row of the round, a value for each token.
    """

    name: str
    set: str
    short: str
    signed: bool
    values: list[Values]

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return ends_of(value for values in self.values for value in values)

    def shade(self, value: float | None) -> float | None:
        """Returns how strongly a value is coloured. The root makes small values visible beside large ones."""
        if value is None:
            return None
        low, high = self.ends
        if self.signed:
            strength = min(1.0, math.sqrt(abs(value) / (max(abs(low), abs(high)) or 1.0)))
            return round(math.copysign(strength, value), 3)
        return round((value - low) / (high - low), 3) if high > low else 0.5

    def shades(self, row: int) -> Values:
        """Returns a shade for each token of the row at a place in the round."""
        return [self.shade(value) for value in self.values[row]]

    def legend(self) -> dict[str, Any]:
        """Returns the names, and the colours of the scale with the numbers at both ends."""
        low, high = self.ends
        scale = max(abs(low), abs(high)) or 1.0
        values = [step * scale if self.signed else low + step * (high - low) for step in _STEPS[self.signed]]
        return {
            "name": visible(self.name),
            "set": self.set,
            "short": visible(self.short),
            "signed": self.signed,
            "ends": [signed(values[0]), signed(values[-1])] if self.signed else [number(low), number(high)],
            "ramp": [self.shade(value) for value in values],
        }


def layers_of(recording: Recording) -> list[Layer]:
    """Returns the advantages after each stage, what each plugin changed, and the other values of tokens."""
    stages, rows = recording.advantage_stages, recording.rows
    layers = []
    for stage, by in enumerate(stages):
        name, short = (f"advantage after {by}", f"after {by}") if stage else (f"advantage of {by}", by)
        layers.append(Layer(name, "advantage", short, True, [row.token_advantages(stage) for row in rows]))
    for stage, by in enumerate(stages[1:], 1):
        changes = [_differences(row.token_advantages(stage - 1), row.token_advantages(stage)) for row in rows]
        layers.append(Layer(f"change by {by}", "change by", by, True, changes))
    for name in dict.fromkeys(name for row in rows for name in row.values):
        values = [row.values.get(name, [None] * len(row.ids)) for row in rows]
        layers.append(Layer(name, "other values", name, False, values))
    return layers


def _differences(before: Values, after: Values) -> Values:
    pairs = zip(before, after, strict=True)
    return [None if old is None or new is None else new - old for old, new in pairs]


def ends_of(values: Iterable[float | None]) -> tuple[float, float]:
    """Returns the lowest and the highest of the known values, 0 and 0 where none is known."""
    known = [value for value in values if value is not None]
    return (min(known), max(known)) if known else (0.0, 0.0)
