"""The overview of enabled plugins, as text and as HTML: who acts at each stage, which options differ, what ran."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from trl_ext_hooks import TrainerKind

from ..catalog.declaration import HOOKS, PluginSpec
from ..support import pages
from .compose import Plan

TEMPLATE = Path(__file__).with_name("overview.html")


@dataclasses.dataclass(frozen=True)
class Overview:
    """What can be said of enabled plugins.

    Attributes:
        specs: The plugins in the order in which they were asked for.
        kinds: The trainers that they serve.
        enabled: Whether new trainers get them.
        counts: For each living trainer, how often each hook of each plugin ran.
    """

    specs: tuple[PluginSpec, ...]
    kinds: Sequence[TrainerKind]
    enabled: bool
    counts: Sequence[Mapping[tuple[str, str], int]]

    @property
    def title(self) -> str:
        """The plugins, the trainers, and whether they are on."""
        names, kinds = " and ".join(spec.name for spec in self.specs), ", ".join(self.kinds).upper()
        count = len(self.counts)
        trainers = f"{count} living trainer{'' if count == 1 else 's'} with them" if count else "no trainer has them"
        return f"{names} on {kinds}: {'enabled' if self.enabled else 'disabled'}, {trainers}"

    def stages(self) -> list[tuple[str, str, str]]:
        """Returns a row for every stage: its hook, the plugins in order, and how often each of them ran."""
        served = {kind: dict(Plan(kind, self.specs, {}, {}, ()).stages()) for kind in self.kinds}
        rows = []
        for hook in HOOKS:
            kinds = [kind for kind in self.kinds if hook in served[kind]]
            if kinds:
                names = served[kinds[0]][hook]
                only = f" ({', '.join(kinds).upper()})" if len(kinds) < len(self.kinds) else ""
                calls = [sum(count.get((name, hook), 0) for count in self.counts) for name in names]
                rows.append((hook, " → ".join(names) + only, " → ".join(map(str, calls))))
        return rows

    def options(self) -> list[tuple[str, str]]:
        """Returns the options that differ from their defaults, with their values."""
        return [
            (f"{spec.name}.{name}", repr(value)) for spec in self.specs for name, value in spec.changed_options.items()
        ]

    def text(self) -> str:
        """Returns the overview as lines of text."""
        stages, options = self.stages(), self.options()
        lines = [self.title, "", *_aligned([("stage", "plugins, in order", "calls"), *stages]), ""]
        lines += _aligned([("option", "value"), *options]) if options else ["all options: default"]
        return "\n".join(lines)

    def html(self) -> str:
        """Returns the overview as a piece of HTML. Names and values are escaped."""
        return pages.fragment(TEMPLATE, title=self.title, stages=self.stages(), options=self.options())


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Returns rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
