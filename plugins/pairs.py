"""List of pairs in plugins/README.md, from the declarations of the built-in plugins: `make docs`."""

from __future__ import annotations

import functools
import itertools
import re
import textwrap
from pathlib import Path

from trl_ext.catalog import builtins, declaration, find
from trl_ext.plan import compose

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- pairs: written by `make docs` -->\n", "<!-- end of pairs -->\n"
WORDS = ("one plugin", "the other")
WIDTH = 80
GIVEN: dict[str, dict[str, str]] = {
    "polychromic": {"strategy": "trl_ext_plugins.polychromic.strategies.tools_called"},
}
"""Values of options that have no default. They decide no pair."""


@functools.cache
def pairs() -> list[tuple[declaration.PluginSpec, declaration.PluginSpec, str | None]]:
    """Returns every pair of built-ins with the reason why they exclude each other, or None."""
    specs = find.resolve({name: GIVEN.get(name) for name in sorted(builtins.BUILTINS)})
    return [(left, right, compose.why_apart(left, right)) for left, right in itertools.combinations(specs, 2)]


def listing() -> str:
    """Returns a list of all plugins with those that each cannot join, and the reasons below it.

    Plugins without a trainer in common are left out, since the list names the trainers of each.
    """
    partners: dict[str, dict[int, list[str]]] = {name: {} for name in sorted(builtins.BUILTINS)}
    trainers, reasons = dict[str, str](), list[str]()
    for left, right, reason in pairs():
        for spec in (left, right):
            trainers[spec.name] = ", ".join(kind.upper() for kind in spec.cls.trainers)
        if reason is None or not set(left.cls.trainers) & set(right.cls.trainers):
            continue
        text = without_names(reason, left.name, right.name)
        if text not in reasons:
            reasons.append(text)
        for one, other in ((left.name, right.name), (right.name, left.name)):
            partners[one].setdefault(reasons.index(text) + 1, []).append(other)
    lines = []
    for name, by_reason in partners.items():
        listed = "; ".join(f"{', '.join(by_reason[number])} ({number})" for number in sorted(by_reason))
        lines.append(_folded(f"- **{name}** ({trainers[name]}): {listed or 'none'}", "  "))
    lines += ["", *(_folded(f"{number}. {reason}", "   ") for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def _folded(text: str, indent: str) -> str:
    """Folds an entry of a list at the width of a terminal."""
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def without_names(reason: str, left: str, right: str) -> str:
    """Returns a reason that calls the two plugins one and the other, in the order in which it names them."""
    text = reason.rpartition("cannot be combined: ")[2].partition(" Leave one out")[0]
    text = re.sub(r" \([^)]*\)", "", text)
    for name, word in zip(sorted((left, right), key=lambda name: text.find(f"'{name}'")), WORDS, strict=True):
        text = text.replace(f"'{name}'", word)
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    head, rest = README.read_text().split(BEGIN)
    README.write_text(head + BEGIN + listing() + END + rest.split(END)[1])
