"""Gradients that are not clipped, as clipping to a norm takes back a factor on all advantages."""

from __future__ import annotations

from typing import Any


def settings(kind: str, folder: Any) -> dict[str, Any]:
    return {"max_grad_norm": 0.0}
