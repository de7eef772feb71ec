"""For the comparison of polychromic sets: questions with four right letters each, and how many of them are written."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from trl_ext import lab
from trl_ext.lab.builtin.letters import CHOICES, QUESTIONS
from trl_ext.lab.messages import final_text, user

GROUP = 8
"""`num_generations` of the recipe."""


def right_letters(question: str) -> str:
    """Returns the four answers to a question."""
    return "".join(random.Random(f"right letters {question}").sample(CHOICES, 4))


def rows(split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Repeats the same few questions."""
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(size)]
    return [{"prompt": user(question), "answers": right_letters(question)} for question in questions]


def right(completions: list[Any], answers: list[str], **columns: Any) -> list[float]:
    """Returns 1 where an answer is one of the right letters and nothing else."""
    texts = map(final_text, completions)
    return [float(len(text) == 1 and text in letters) for text, letters in zip(texts, answers, strict=True)]


def behaviour(completions: list[Any], answers: list[str], **columns: Any) -> dict[str, list[float | None]]:
    """Counts the different right letters in each group of eight answers, and says it of all of them."""
    texts, different = list(map(final_text, completions)), list[float | None]()
    for start in range(0, len(texts), GROUP):
        group = texts[start : start + GROUP]
        different += [float(len({text for text in group if len(text) == 1 and text in answers[start]}))] * len(group)
    return {"different": different}


TASK = dataclasses.replace(
    lab.task("right-letter"),
    name="four-letters",
    summary="six questions with four right letters each, one of which is asked for",
    rows=rows,
    rewards=(right,),
    behaviour=behaviour,
)
