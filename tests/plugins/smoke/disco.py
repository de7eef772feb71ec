"""The share of digits says what is right. RLOO has a KL term of its own, which the loss replaces."""

from __future__ import annotations

from typing import Any

OPTIONS = {"correct_reward": "digits", "correct_threshold": 0.1}


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"beta": 0.0}
