"""Full stops are likely, and each is followed by an empty line, which ends a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trl_ext.testing import tiny_model


def settings(kind: str, folder: Path) -> dict[str, Any]:
    model = tiny_model(folder / "tool-model", tools=True)
    stop, line, _ = AutoTokenizer.from_pretrained(model).encode(".\n\n", add_special_tokens=False)
    bias = [[[stop], 2.0], [[stop, line], 100.0], [[stop, line, line], 100.0]]
    return {"model": model, "max_completion_length": 24, "generation_kwargs": {"sequence_bias": bias}}
