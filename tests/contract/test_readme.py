"""The front page is short, its script runs, and its table of methods is that of the declarations."""

from __future__ import annotations

import re
from pathlib import Path

from trl_ext.catalog import builtins, find

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 100


def test_the_first_screen_has_commands_script_command_line_and_picture() -> None:
    first_screen = README.partition("\n## ")[0]
    for content in ("make demo", "make test", "```python\n", "trl_ext train --plugin", "!["):
        assert content in first_screen, content
    (script,) = re.findall(r"```python\n(.*?)```", first_screen, re.DOTALL)
    assert len([line for line in script.splitlines() if line]) <= 8


def test_the_table_of_methods_is_that_of_the_declarations() -> None:
    rows = re.findall(r"^\| \[`([a-z0-9-]+)`\]\(plugins/docs/([a-z0-9-]+)\.md\) \| (.*?) \| (.*?) \|", README, re.M)
    assert sorted(name for name, *_ in rows) == sorted(builtins.BUILTINS)
    for name, page, method, trainers in rows:
        plugin, *_ = find.find(name)
        assert page == name
        assert trainers == ", ".join(kind.upper() for kind in plugin.trainers), name
        assert not plugin.paper.startswith("arXiv") or f"[{plugin.paper}](" in method, name
