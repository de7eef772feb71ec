"""Tools need a model whose template can call them, and room for a call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_ext.testing import calls, tiny_model

OPTIONS = {"functions": ["trl_ext.tools.calculator"]}


def settings(kind: str, folder: Path) -> dict[str, Any]:
    model = tiny_model(folder / "tool-model", tools=True)
    return {
        "model": model,
        "max_completion_length": 110,
        "max_tool_calling_iterations": 1,
        "generation_kwargs": calls(model, "calculator", end=2.0, expression="1+1"),
    }
