"""Sets of two, as groups have four completions. The first letter is the strategy."""

from __future__ import annotations

from typing import Any

OPTIONS = {"strategy": "smoke_polychromic:first_letter", "set_size": 2}


def first_letter(completions: list[Any], **columns: Any) -> list[str | None]:
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [text[:1] or None for text in texts]
