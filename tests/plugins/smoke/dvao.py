"""A second reward that differs inside every group: short completions are all equally brief."""

from __future__ import annotations

from typing import Any


def even(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"rewards": [even]}
