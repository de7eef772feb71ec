"""Grid of pairs in plugins/README.md, from the declarations of the built-in plugins: `make docs`."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from trl_ext.catalog import builtins, declaration, find
from trl_ext.plan import compose

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- pairs: written by `make docs` -->\n", "<!-- end of pairs -->\n"
WORDS = ("one plugin", "the other")


def pairs() -> list[tuple[declaration.PluginSpec, declaration.PluginSpec, str | None]]:
    """Returns every pair of built-ins with the reason why they exclude each other, or None."""
    specs = find.resolve({name: None for name in sorted(builtins.BUILTINS)})
    return [(left, right, compose.why_apart(left, right)) for left, right in itertools.combinations(specs, 2)]


def table() -> str:
    """Returns the grid: trainers where a pair works, else the number of a reason below the grid."""
    names, cells, reasons = sorted(builtins.BUILTINS), {}, list[str]()
    for left, right, reason in pairs():
        if reason is None:
            cell = ", ".join(kind.upper() for kind in compose.common_trainers([left, right]))
        else:
            text = without_names(reason, left.name, right.name)
            if text not in reasons:
                reasons.append(text)
            cell = f"({reasons.index(text) + 1})"
        cells[left.name, right.name] = cells[right.name, left.name] = cell
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| **{row}** | {' | '.join(cells.get((row, column), '') for column in names)} |" for row in names]
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def without_names(reason: str, left: str, right: str) -> str:
    """Returns a reason that calls the two plugins one and the other, in the order in which it names them."""
    text = reason.rpartition("cannot be combined: ")[2].partition(" Leave one out")[0]
    text = re.sub(r" \([^)]*\)", "", text)
    for name, word in zip(sorted((left, right), key=lambda name: text.find(f"'{name}'")), WORDS, strict=True):
        text = text.replace(f"'{name}'", word)
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + BEGIN + table() + END + rest.split(END)[1])
