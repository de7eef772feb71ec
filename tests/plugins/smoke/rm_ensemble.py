"""Two functions that disagree stand for reward models; the other rewards stay as they are."""

from __future__ import annotations

from typing import Any

OPTIONS = {"models": ["low_ids", "high_ids"], "objective": "uwo", "coefficient": 0.5}


def low_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) / 3 for ids in completion_ids]


def high_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 5) / 2 for ids in completion_ids]


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"rewards": [low_ids, high_ids]}
