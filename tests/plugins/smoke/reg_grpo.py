"""Rollouts are used twice, so that there are log-ratios to regress."""

from __future__ import annotations

from typing import Any


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"num_iterations": 2, "beta": 0.0}
