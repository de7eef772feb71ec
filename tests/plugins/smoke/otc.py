"""Calls are counted in the text, so that rollouts without tools will do: a letter is one, and some rows write it."""

from __future__ import annotations

from typing import Any

OPTIONS = {"c": 4, "call_tag": "e"}


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"max_completion_length": 24}
