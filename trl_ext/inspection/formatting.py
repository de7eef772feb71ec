"""The writing of texts and numbers of a recording, in a terminal and on the page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

SILENT = 1e-8
"""TRL's own bound for an advantage that is none."""
_BARS = "▁▂▃▄▅▆▇█"
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def visible(text: str) -> str:
    """Makes model output safe to print: nothing in it can steer a terminal or turn the order of a line around.

    Line feeds and tabs stay. Other control characters become their pictures (ESC is ␛) or `\\u202e`.
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else _shown(letter) for letter in text)


def _shown(letter: str) -> str:
    code = ord(letter)
    if code < 32:
        return chr(0x2400 + code)
    if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in _BIDI:
        return f"\\u{code:04x}"
    return letter


def number(value: float | None) -> str:
    """Writes a number with three digits, and `-` where a value does not apply."""
    return "-" if value is None else f"{value:.3g}"


def signed(value: float | None) -> str:
    """Writes a number with three digits and a sign. 0 has none, and what rounding errors leave of it is `~0`."""
    if value is None:
        return "-"
    return f"{value:+.3g}" if abs(value) > SILENT else "~0" if value else "0"


def chain(values: Sequence[str]) -> str:
    """Writes the values of successive stages. One that nobody changed is written once."""
    return " → ".join(chain_of(values))


def chain_of(values: Sequence[str]) -> list[str]:
    """Returns values without those that equal the one before."""
    return [value for index, value in enumerate(values) if index == 0 or value != values[index - 1]]


def sparkline(values: Sequence[float | None], width: int = 60) -> str:
    """Draws bars for the means of at most `width` equal stretches. A stretch without values is blank.

    Where the lowest and the highest are written alike, such as -2.4748 and -2.4711, all bars are.
    """
    size = max(1, math.ceil(len(values) / width))
    stretches = [[v for v in values[i : i + size] if v is not None] for i in range(0, len(values), size)]
    means = [sum(stretch) / len(stretch) if stretch else None for stretch in stretches]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    reach = high - low if number(low) != number(high) else math.inf
    return "".join(" " if m is None else _BARS[round((m - low) / reach * (len(_BARS) - 1))] for m in means)
