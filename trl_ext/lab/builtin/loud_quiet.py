"""Task `loud-quiet`: two rewards of very different size, a loud one that cannot be learnt and a quiet one that is easy.

The answer to `code qzkt` is four letters, `abcd` or `[abcd]`. `loud` is an integer from -3 to 3 that depends on prompt
and answer like a hash. `quiet` is 1 for the brackets, which the warmed-up model sets in about one of eight answers. A
method that adds rewards before it normalises them hardly hears the quiet one.
"""

from __future__ import annotations

import random
import re
import string
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, final_text, hashed_integer, in_split, user

BRACKETED = 0.12
"""Share of bracketed answers among the traces."""


def loud(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Returns an integer from -3 to 3 that looks random and is always the same for a prompt and an answer."""
    return [
        float(hashed_integer(f"{prompt[-1]['content']}|{final_text(completion)}", -3, 3))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def quiet(completions: list[Any], **columns: Any) -> list[float]:
    """Returns 1 where the answer is four letters in brackets."""
    return [float(re.fullmatch(r"\[[a-z]{4}\]", final_text(completion)) is not None) for completion in completions]


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes prompts of which no two are equal."""
    random_state = random.Random(f"loud-quiet {split} {seed}")
    questions: dict[str, Row] = {}
    while len(questions) < size:
        letters = _letters(random_state, split)
        questions[letters] = {"prompt": user(f"code {letters}")}
    return list(questions.values())


def traces(size: int, seed: int) -> list[Row]:
    """Makes answers of random letters, some of them in brackets."""
    random_state = random.Random(f"loud-quiet traces {seed}")
    examples = []
    for _ in range(size):
        answer = _letters(random_state)
        prompt = user(f"code {_letters(random_state, 'train')}")
        if random_state.random() < BRACKETED:
            answer = f"[{answer}]"
        examples.append({"prompt": prompt, "completion": assistant(answer)})
    return examples


def _letters(random_state: random.Random, split: str = "") -> str:
    """Draws four letters: any, or such as a split may ask about."""
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
