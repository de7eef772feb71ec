"""For the comparison of ensembles: the lab's task `letters` with four judges, each with a mistake of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from trl_ext import lab
from trl_ext.lab.builtin.letters import BAD, LENGTH, good_minus_bad
from trl_ext.lab.messages import final_text

ERROR = 9.0
"""What a judge overpays per letter. A quarter of it, as in the mean of four, still makes a bad letter worth 1.25."""


def judge(letter: str) -> Callable[..., list[float]]:
    """Makes a judge that adds `ERROR` for every copy of its own bad letter with which an answer begins.

    No answer can begin with two letters, so never more than one judge is wrong.
    """

    def score(completions: list[Any], **columns: Any) -> list[float]:
        texts = [final_text(completion)[:LENGTH] for completion in completions]
        runs = [len(text) - len(text.lstrip(letter)) for text in texts]
        return [true + ERROR * run for true, run in zip(good_minus_bad(completions), runs, strict=True)]

    score.__name__ = f"judge_{letter}"
    return score


TASK = dataclasses.replace(lab.task("letters"), rewards=(good_minus_bad, *map(judge, BAD)))
