"""HDPO needs tools, and a model whose template can call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_ext.testing import tiny_model
from trl_ext.tools import calculator


def settings(kind: str, folder: Path) -> dict[str, Any]:
    return {"model": tiny_model(folder / "tool-model", tools=True), "trainer": {"tools": [calculator]}}
