"""Writes the table of pairs in plugins/README.md from the declarations of the built-in plugins: `make docs`."""

from __future__ import annotations

import itertools
from pathlib import Path

from trl_ext.catalog import builtins, declaration, find
from trl_ext.plan import compose

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- pairs: written by `make docs` -->\n", "<!-- end of pairs -->\n"


def pairs() -> list[tuple[declaration.PluginSpec, declaration.PluginSpec, str | None]]:
    """Every pair of built-ins with the reason why they exclude each other, or None."""
    specs = find.resolve({name: None for name in sorted(builtins.BUILTINS)})
    return [(left, right, compose.why_apart(left, right)) for left, right in itertools.combinations(specs, 2)]


def table() -> str:
    lines = ["| together | trainers | |", "|---|---|---|"]
    for left, right, reason in pairs():
        common = "" if reason else ", ".join(kind.upper() for kind in compose.common_trainers([left, right]))
        lines.append(f"| `{left.name}`, `{right.name}` | {common} | {reason or 'works'} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + BEGIN + table() + END + rest.split(END)[1])
