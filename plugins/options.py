"""Stages and options in plugins/docs/, from the declarations of the built-in plugins: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path

from trl_ext.catalog import builtins
from trl_ext.cli.show import declaration

PAGES = Path(__file__).parent / "docs"
BEGIN, END = "<!-- options: written by `make docs` -->\n", "<!-- end of options -->\n"


def table(method: str) -> str:
    """Returns the stages and options that `trl_ext show` lists, with defaults as a YAML file has them."""
    shown = declaration(method)
    lines = [f"Stages: {', '.join(f'`{hook}`' for hook in shown['hooks'] or shown['lifecycle'])}.", ""]
    lines += ["| option | default | what it does | source of the default |", "|---|---|---|---|"]
    for option in shown["options"]:
        default = "required" if option["required"] else f"`{json.dumps(option['default'], default=str)}`"
        lines.append(f"| `{option['name']}` | {default} | {_text(option['help'])} | {_text(option['source'])} |")
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Returns a text without characters that end a cell, set words in italics or open a tag."""
    for character in "|*<":
        text = text.replace(character, f"\\{character}")
    return text


if __name__ == "__main__":
    for name in builtins.BUILTINS:
        page = PAGES / f"{name}.md"
        head, rest = page.read_text().split(BEGIN)
        page.write_text(head + BEGIN + table(name) + END + rest.split(END)[1])
