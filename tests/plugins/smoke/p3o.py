"""RLOO has a KL term of its own, which P3O replaces."""

from __future__ import annotations

from typing import Any


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"beta": 0.0}
