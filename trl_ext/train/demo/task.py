"""Task of the embedded default: sums and differences of two digits, answered with the whole equation.

The questions come from `reasoning_gym` (chain_sum). There are two rewards. `correctness` reads the last number of a
reply. `format` is for a reply that is one equation, such as `5 - 3 = 2`, and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...support import cache

PROMPT = "{expression} = ? Reply with the whole equation and nothing else."
HELD_OUT = 40
"""Number of held-out questions."""
VERSION = 2
"""Part of the name of the cached data. Raise it when the questions or the prompt change."""

_NUMBER = re.compile(r"-?\d+")
_EQUATION = re.compile(r"\s*\d+ [+-] \d+ = -?\d+\.?\s*")


def correctness(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Returns 1 where the last number of a reply is the answer."""
    numbers = [_NUMBER.findall(text) for text in map(_text, completions)]
    return [
        float(bool(written) and int(written[-1]) == int(right)) for written, right in zip(numbers, answer, strict=True)
    ]


def format(completions: list[Any], **columns: Any) -> list[float]:
    """Returns 1 where a reply is one equation and nothing else."""
    return [float(_EQUATION.fullmatch(text) is not None) for text in map(_text, completions)]


def questions() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns rows for training and held-out rows, always the same. No question is in both."""
    from reasoning_gym import create_dataset

    dataset = create_dataset("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=2000, seed=0)
    rows: dict[str, dict[str, Any]] = {}
    for entry in dataset:
        expression = entry["metadata"]["expression"]
        prompt = [{"role": "user", "content": PROMPT.format(expression=expression)}]
        rows.setdefault(expression, {"prompt": prompt, "answer": entry["answer"]})
    distinct = list(rows.values())
    return distinct[HELD_OUT:], distinct[:HELD_OUT]


def folder(say: Callable[[str], None] = print) -> Path:
    """Returns a folder of the cache with `train.jsonl` and `test.jsonl`, which are written once."""
    target = cache.cache_folder() / f"arithmetic-{VERSION}"

    def make(work: Path) -> None:
        say(f"writing the questions of the task into {target}")
        for name, rows in zip(("train", "test"), questions(), strict=True):
            (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return cache.kept(target, make)


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[0]["content"])
