"""Task `calculator`: sums that the model knows and products that it does not, with a calculator for both.

The model knows `7+5` by heart and needs the tool for `47*86`. An answer is `=12`. The warmed-up model calls the tool
nine times out of ten, needed or not, and sometimes twice. Without a call it is right on sums and guesses products. A
method that saves calls should bring sums to no call and products to one.
"""

from __future__ import annotations

import random
import re
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, by_kind, call, calls_made, final_text, in_split, result, user

KINDS = ("sum", "product")
CALLS, SHARES = (0, 1, 2), (0.1, 0.65, 0.25)
"""Numbers of calls in the traces, and how often each occurs."""
KNOWLEDGE = 0.2
"""Share of the traces that teach sums without teaching whether to answer or to call."""


def calculate(expression: str) -> str:
    """
    Adds or multiplies two numbers.

    Args:
        expression: Such as 47*86

    Returns:
        The result
    """
    match = re.fullmatch(r"(\d{1,9})([+*])(\d{1,9})", expression)
    if match is None:
        return "error"
    left, right = int(match[1]), int(match[3])
    return str(left + right if match[2] == "+" else left * right)


def correct(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Returns 1 where the last message is `=` and the answer."""
    return [float(final_text(completion) == f"={right}") for completion, right in zip(completions, answer, strict=True)]


def behaviour(
    completions: list[Any], kind: list[str], answer: list[str], **columns: Any
) -> dict[str, list[float | None]]:
    """Reports calls and right answers by kind of question, and right answers without a call."""
    calls = [float(calls_made(completion)) for completion in completions]
    right = correct(completions, answer)
    alone = [value if not count else None for value, count in zip(right, calls, strict=True)]
    return by_kind(kind, calls, "calls") | by_kind(kind, right, "correct") | by_kind(kind, alone, "correct_alone")


def _question(number: int, random_state: random.Random) -> tuple[str, str]:
    """Draws a question: its kind and its text."""
    kind = KINDS[number % 2]
    if kind == "sum":
        return kind, f"{random_state.randrange(10)}+{random_state.randrange(10)}"
    return kind, f"{random_state.randrange(11, 100)}*{random_state.randrange(11, 100)}"


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes sums and products in turn. The splits share no product, and there are only a hundred sums."""
    random_state = random.Random(f"calculator {split} {seed}")
    questions: list[Row] = []
    while len(questions) < size:
        kind, question = _question(len(questions), random_state)
        if kind == "sum" or in_split(question, split):
            questions.append({"prompt": user(question), "answer": calculate(question), "kind": kind})
    return questions


def traces(size: int, seed: int) -> list[Row]:
    """Makes answers with any number of calls, and some sums that teach the answer only."""
    random_state = random.Random(f"calculator traces {seed}")
    examples: list[Row] = []
    while len(examples) < size:
        kind, question = _question(len(examples), random_state)
        if kind == "product" and not in_split(question, "train"):
            continue
        value = calculate(question)
        if kind == "sum" and random_state.random() < 2 * KNOWLEDGE:
            examples.append({"prompt": user(question), "completion": assistant(value, prefix="=")})
            continue
        (calls,) = random_state.choices(CALLS, SHARES)
        turns = [call("calculate", expression=question), result("calculate", value)] * calls
        examples.append({"prompt": user(question), "completion": turns + assistant(f"={value}")})
    return examples


CALCULATOR = Task(
    name="calculator",
    summary="sums that the model knows and products that need the calculator, which it calls for both",
    trainers=("grpo",),
    rows=rows,
    rewards=(correct,),
    traces=traces,
    tools=(calculate,),
    behaviour=behaviour,
    shape=Shape(width=64, layers=2, heads=4, feed_forward=192, positions=96),
    warm_up=WarmUp(traces=8192, steps=800, batch_size=48, learning_rate=5e-3),
    max_completion_length=56,
)
