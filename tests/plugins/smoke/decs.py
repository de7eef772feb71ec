"""Letters begin chunks, and every chunk states the answer, so that all behind the first one is redundant."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters
from typing import Any

OPTIONS = {"judge": f"{__name__}:every", "split_words": list(ascii_letters)}


def every(questions: Sequence[Any]) -> list[bool]:
    return [True] * len(questions)


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"max_completion_length": 24, "seed": 3}
