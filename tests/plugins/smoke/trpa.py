"""A reward function that gives preference levels."""

from __future__ import annotations

from typing import Any


def preference_level(completion_ids: list[list[int]], **kwargs: Any) -> list[int]:
    return [1 + sum(ids) % 4 for ids in completion_ids]


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"rewards": [preference_level]}
