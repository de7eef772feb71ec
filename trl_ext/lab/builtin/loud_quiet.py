"""Two rewards of very different size: a loud one that nobody can learn, a quiet one that is easy.

`code qzkt` is to be answered with four letters, `abcd` or `[abcd]`. `loud` is an integer from -3 to 3 that depends on
prompt and answer like a hash; `quiet` is 1 for the brackets, which the warmed-up model sets in about one of eight
answers. A method that adds the rewards before it normalises hardly hears the quiet one.
"""

from __future__ import annotations

import random
import re
import string
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, drawn, final_text, in_split, user

BRACKETED = 0.12
"""Share of bracketed answers among the traces."""


def loud(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """An integer from -3 to 3 that looks random and is always the same for a prompt and an answer."""
    return [
        float(drawn(f"{prompt[-1]['content']}|{final_text(completion)}", -3, 3))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def quiet(completions: list[Any], **columns: Any) -> list[float]:
    """1 where the answer is four letters in brackets."""
    return [float(re.fullmatch(r"\[[a-z]{4}\]", final_text(completion)) is not None) for completion in completions]


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Different prompts, no two of a data set equal."""
    random_state = random.Random(f"loud-quiet {split} {seed}")
    found: dict[str, Row] = {}
    while len(found) < size:
        letters = _letters(random_state, split)
        found[letters] = {"prompt": user(f"code {letters}")}
    return list(found.values())


def traces(size: int, seed: int) -> list[Row]:
    random_state = random.Random(f"loud-quiet traces {seed}")
    found = []
    for _ in range(size):
        answer = _letters(random_state)
        prompt = user(f"code {_letters(random_state, 'train')}")
        if random_state.random() < BRACKETED:
            answer = f"[{answer}]"
        found.append({"prompt": prompt, "completion": assistant(answer)})
    return found


def _letters(random_state: random.Random, split: str = "") -> str:
    """Any four letters, or four that a split may ask about."""
    while True:
        letters = "".join(random_state.choices(string.ascii_lowercase, k=4))
        if not split or in_split(letters, split):
            return letters


LOUD_QUIET = Task(
    name="loud-quiet",
    summary="four letters, in brackets; a loud random reward drowns the quiet one for the brackets",
    trainers=("grpo", "rloo"),
    rows=rows,
    rewards=(loud, quiet),
    traces=traces,
    words=("code ",),
    shape=Shape(width=64, layers=2, heads=4, feed_forward=128, positions=32),
    warm_up=WarmUp(traces=4096, steps=300, batch_size=64, learning_rate=3e-3),
    max_completion_length=8,
)
