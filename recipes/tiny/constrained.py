"""For the comparison of constrained RLHF: the lab's task `letters` with a reward that is useful up to a point only."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl_ext import lab
from trl_ext.lab.builtin.letters import GOOD, LENGTH
from trl_ext.lab.messages import final_text

KEYWORD, USEFUL = "k", 2


def _counts(completions: list[Any]) -> list[tuple[int, int]]:
    """Returns the good letters and the copies of `KEYWORD` among the first six letters of each answer."""
    texts = [final_text(completion)[:LENGTH] for completion in completions]
    return [(sum(letter in GOOD for letter in text), text.count(KEYWORD)) for text in texts]


def true_value(completions: list[Any], **columns: Any) -> list[float]:
    """Returns the share of good letters and of the first two keywords, which the policy is not trained on."""
    return [(good + min(keywords, USEFUL)) / LENGTH for good, keywords in _counts(completions)]


def good(completions: list[Any], **columns: Any) -> list[float]:
    """Returns the share of good letters."""
    return [letters / LENGTH for letters, _ in _counts(completions)]


def keyword(completions: list[Any], **columns: Any) -> list[float]:
    """Returns the share of keywords, also where more of them are of no use."""
    return [keywords / LENGTH for _, keywords in _counts(completions)]


TASK = dataclasses.replace(lab.task("letters"), rewards=(true_value, good, keyword))
