"""The notebook runs from top to bottom in one process, and says what its cells show."""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOTrainer

NOTEBOOK = json.loads((Path(__file__).parents[2] / "recipes" / "first-steps.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def cells(namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Runs the cells one after the other, and yields the code of each with the value of its last line."""
    for cell in CODE:
        code = "".join(cell["source"])
        statements = ast.parse(code).body
        last = statements.pop() if isinstance(statements[-1], ast.Expr) else None
        exec(compile(ast.Module(statements, []), "first-steps.ipynb", "exec"), namespace)
        yield code, eval(ast.unparse(last), namespace) if last else None


def test_no_output_is_committed() -> None:
    assert [(cell["outputs"], cell["execution_count"]) for cell in CODE] == [([], None)] * len(CODE)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    constructor: Callable[..., None] = GRPOTrainer.__init__
    namespace: dict[str, Any] = {}
    shown: list[Any] = []
    for code, value in cells(namespace):
        if code == "handle":
            shown.append(value._repr_html_())
        elif "sum().item()" in code:
            shown.append(value)
        elif code.startswith("main("):
            assert value == 0 and "gdpo" in capsys.readouterr().out
    plain_sum, gdpo_sum, html = shown
    assert plain_sum != gdpo_sum
    assert "enabled, 1 living trainer with them" in html and "gdpo.group_eps" in html
    assert namespace["new"] and all("gdpo/" in name for name in namespace["new"])
    assert value is True  # the last cell compares the plain run with the one after the undo
    assert GRPOTrainer.__init__ is constructor and type(namespace["trainer"]) is GRPOTrainer
