"""Task `modes`: easy and hard questions, and two ways to answer them, at once or after thinking.

The first token of an answer is `<short>`, followed by the answer, or `<think>`, followed by the steps, `</think>` and
the answer. `easy:3+4` is one step, which the model knows by heart. `hard:3+4*7+2*9` is five steps, which it gets right
only by writing them down (`chains` says why). Warm-up leaves both ways equally likely on both kinds. On easy questions
thinking repeats the step, so that it costs as much as on hard ones.
"""

from __future__ import annotations

import random
import re
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, final_text, in_split, user
from .chains import Chain

SHORT, THINK, THOUGHT = "<short>", "<think>", "</think>"
LENGTHS = {"easy": 1, "hard": 5}
"""Number of steps of a question, by its kind."""

_ANSWER = re.compile(rf"(?:{SHORT}|{THINK}[^<]*{THOUGHT})(\d)")


def correct(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Returns 1 where the digit after `<short>` or after `</think>` is the answer."""
    matches = [_ANSWER.fullmatch(final_text(completion)) for completion in completions]
    return [float(match is not None and match[1] == right) for match, right in zip(matches, answer, strict=True)]


def behaviour(
    completions: list[Any], kind: list[str], answer: list[str], **columns: Any
) -> dict[str, list[float | None]]:
    """Reports the share of thinking by kind of question, and of right answers by kind and way of answering."""
    texts = [final_text(completion) for completion in completions]
    right = correct(completions, answer)
    values: dict[str, list[float | None]] = {}
    for wanted in LENGTHS:
        values[f"think_{wanted}"] = [
            float(text.startswith(THINK)) if row_kind == wanted else None
            for text, row_kind in zip(texts, kind, strict=True)
        ]
        for way in (SHORT, THINK):
            values[f"correct_{wanted}_{way[1:-1]}"] = [
                value if row_kind == wanted and text.startswith(way) else None
                for text, row_kind, value in zip(texts, kind, right, strict=True)
            ]
    return values


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes easy and hard questions in turn. The splits share no hard question, and there are only a few easy ones."""
    random_state = random.Random(f"modes {split} {seed}")
    questions: list[Row] = []
    while len(questions) < size:
        kind = ("easy", "hard")[len(questions) % 2]
        chain = Chain.draw(LENGTHS[kind], random_state)
        if kind == "easy" or in_split(chain.text, split):
            questions.append({"prompt": user(f"{kind}:{chain.text}"), "answer": chain.answer, "kind": kind})
    return questions


def traces(size: int, seed: int) -> list[Row]:
    """Makes right answers, half of them at once and half after thinking."""
    random_state = random.Random(f"modes traces {seed}")
    examples: list[Row] = []
    while len(examples) < size:
        kind = ("easy", "hard")[len(examples) % 2]
        chain = Chain.draw(LENGTHS[kind], random_state)
        if kind == "hard" and not in_split(chain.text, "train"):
            continue
        steps = "".join(f"{operation}={value}" for operation, value in zip(chain.operations, chain.values, strict=True))
        thought = steps if kind == "hard" else steps * LENGTHS["hard"]
        way = random_state.choice([SHORT, f"{THINK}{thought}{THOUGHT}"])
        examples.append({"prompt": user(f"{kind}:{chain.text}"), "completion": assistant(way + chain.answer)})
    return examples


MODES = Task(
    name="modes",
    summary="easy and hard sums, answered at once or after thinking; thinking pays on the hard ones only",
    trainers=("grpo", "rloo"),
    rows=rows,
    rewards=(correct,),
    traces=traces,
    behaviour=behaviour,
    words=(SHORT, THINK, THOUGHT, "easy:", "hard:"),
    shape=Shape(width=64, layers=2, heads=4, feed_forward=192, positions=64),
    warm_up=WarmUp(traces=16384, steps=700, batch_size=48, learning_rate=5e-3),
    max_completion_length=32,
)
