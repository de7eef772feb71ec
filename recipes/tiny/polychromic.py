"""For the comparison of polychromic sets: four of twelve letters are right, and how many of the four are written."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl_ext import lab
from trl_ext.lab.builtin.letters import GOOD, QUESTIONS
from trl_ext.lab.messages import final_text, user

GROUP = 8
"""`num_generations` of the recipe."""


def rows(split: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Repeats a few prompts, which have the same right answers."""
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(size)]
    return [{"prompt": user(question), "answers": list(GOOD)} for question in questions]


def right(completions: list[Any], answers: list[list[str]], **columns: Any) -> list[float]:
    """Returns 1 where an answer is one of the right letters and nothing else."""
    return [float(final_text(completion) in letters) for completion, letters in zip(completions, answers, strict=True)]


def behaviour(completions: list[Any], answers: list[list[str]], **columns: Any) -> dict[str, list[float | None]]:
    """Counts the different right letters in each group of eight answers, and says it of all of them."""
    texts, different = list(map(final_text, completions)), list[float | None]()
    for start in range(0, len(texts), GROUP):
        group = texts[start : start + GROUP]
        different += [float(len(set(group) & set(answers[start])))] * len(group)
    return {"different": different}


TASK = dataclasses.replace(
    lab.task("right-letter"),
    name="four-letters",
    summary="one letter of twelve, of which four are right",
    rows=rows,
    rewards=(right,),
    behaviour=behaviour,
)
