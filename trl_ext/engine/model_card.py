"""Model card of a run: TRL's own, with the plugins, their options and what to cite."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .._version import __version__
from ..catalog.declaration import PluginSpec
from ..plan.compose import Plan
from ..support.files import write_atomically
from .checkpoint import option_text

FILE = "README.md"
HEADING = "## Plugins"


def complete(folder: Path, plan: Plan) -> None:
    """Adds the plugins of a run to the card that TRL has just written.

    Nothing happens where there is no card, as in a subclass that writes none, or no plugin, as in a run that is only
    recorded.
    """
    file = folder / FILE
    if plan.specs and file.is_file():
        write_atomically(file, completed(file.read_text(encoding="utf-8"), plan))


def completed(card: str, plan: Plan) -> str:
    """Returns a card with a section on the plugins before its citations, and with their citations at its end.

    A card that has the section stays as it is.
    """
    if f"\n{HEADING}\n" in card:
        return card
    citations = [f"Cite {spec.name} as:\n\n```bibtex\n{spec.bibtex}\n```\n" for spec in plan.specs if spec.bibtex]
    body, heading, entries = card.partition("\n## Citations\n")
    if citations and not heading:  # not TRL's template
        heading = "\n## Citations\n"
    parts = [f"{body.rstrip()}\n\n{_section(plan)}", f"{heading}{entries}".rstrip(), *citations]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def _section(plan: Plan) -> str:
    lines = [
        HEADING,
        "",
        f"trl_ext {__version__} added to TRL's {plan.kind.upper()} trainer, in the order in which they act:",
        "",
        *(_line(spec) for spec in plan.specs),
    ]
    changed = {spec.name: _plain(spec.changed_options) for spec in plan.specs if spec.changed_options}
    if not changed:
        return "\n".join([*lines, "", "All their options have the default values."])
    text = yaml.safe_dump({"plugins": changed}, sort_keys=False, allow_unicode=True, width=120)
    # a longer fence than any that stands in a value
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([*lines, "", "Options that differ from their defaults:", "", f"{fence}yaml\n{text}{fence}"])


def _line(spec: PluginSpec) -> str:
    paper = re.sub(r"arXiv (\d+\.\d+)", r"[\g<0>](https://arxiv.org/abs/\1)", spec.cls.paper)
    # of a file only the name, because a card is public
    version, origin = ("", Path(spec.origin).name) if spec.version == "file" else (f" {spec.version}", spec.origin)
    source = ", ".join(filter(None, [origin, paper]))
    return f"- **{spec.name}**{version} ({source})" + (f": {spec.cls.summary}" if spec.cls.summary else "")


def _plain(value: Any) -> Any:
    """Returns a value of options as YAML can hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str | None) else option_text(value)
