"""HDPO needs tools, and a model whose template can call them. Calls are counted in the text, where a letter is one.

Rewards keep their weights, so that other plugins may add some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_ext.testing import tiny_model
from trl_ext.tools import calculator

OPTIONS = {"call_tag": "e", "correct_threshold": -1.0, "w_ans": 1.0, "w_fmt": 0.0}


def settings(kind: str, folder: Path) -> dict[str, Any]:
    model = tiny_model(folder / "tool-model", tools=True)
    return {"model": model, "trainer": {"tools": [calculator]}, "max_completion_length": 24}
