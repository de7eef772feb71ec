"""The lab's task `modes` with the rewards of Thinkless, for arms with the plugin and without it."""

from __future__ import annotations

import dataclasses
from typing import Any

from trl_ext import lab
from trl_ext.lab.builtin.modes import SHORT, correct
from trl_ext.lab.messages import final_text


def mode_score(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Scores as the authors do: right at once 1, right after thinking 0.5, wrong or without a mode -1."""
    if_right = [1.0 if final_text(completion).startswith(SHORT) else 0.5 for completion in completions]
    return [reward if right else -1.0 for reward, right in zip(if_right, correct(completions, answer), strict=True)]


TASK = dataclasses.replace(lab.task("modes"), rewards=(mode_score,))
