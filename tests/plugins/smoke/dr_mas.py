"""A column of the data in place of agents, whose rows are compared in the whole round."""

from __future__ import annotations

from typing import Any

OPTIONS = {"column": "kind", "normalise": "batch"}


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"columns": {"kind": ["sum", "product", "sum", "word"] * 4}}
