"""Letters of the tiny model's alphabet serve as control tokens; answers are short, so alpha is large."""

from __future__ import annotations

OPTIONS = {"alpha": 0.2, "think": "T", "short": "S", "close": "E"}
