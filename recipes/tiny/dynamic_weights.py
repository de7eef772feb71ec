"""The lab's task `letters` with three rewards, of which one opposes the other two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from trl_ext import lab
from trl_ext.lab.builtin.letters import BAD, GOOD, LENGTH
from trl_ext.lab.messages import final_text


def _share(completions: list[Any], counts: Callable[[str], bool]) -> list[float]:
    """Returns how many of the first six letters count, as a share of six."""
    return [sum(map(counts, final_text(completion)[:LENGTH])) / LENGTH for completion in completions]


def good(completions: list[Any], **columns: Any) -> list[float]:
    """Rewards good letters."""
    return _share(completions, lambda letter: letter in GOOD)


def clean(completions: list[Any], **columns: Any) -> list[float]:
    """Rewards letters that are not bad."""
    return _share(completions, lambda letter: letter not in BAD)


def bad(completions: list[Any], **columns: Any) -> list[float]:
    """Rewards bad letters twice, so that the sum of all rewards does not tell them from good ones."""
    return [2 * share for share in _share(completions, lambda letter: letter in BAD)]


TASK = dataclasses.replace(lab.task("letters"), rewards=(good, clean, bad))
