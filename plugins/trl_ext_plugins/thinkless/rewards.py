"""Rewards of the two modes, on what the plugin finds in a rollout."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Reward = Callable[..., list[float | None]]


def mode_reward(
    correct: Callable[[str, Any], bool | None],
    *,
    reference: str = "solution",
    short: float = 1.0,
    think: float = 0.5,
    wrong_short: float = -1.0,
    wrong_think: float = -1.0,
    format_error: float = -1.0,
) -> Reward:
    """Makes a reward function with the authors' constants; raise `think` towards 0.8 if the model becomes too terse.

    The mode is the first token of the completion. The answer is what follows `<short>`, or follows `</think>`. A
    completion without a mode, or with `<think>` and without `</think>`, is a format error.

    Args:
        correct: Whether one answer matches one reference; None = cannot be told, then the row has no reward.
        reference: Column of the data with the reference of a prompt, or a list of which any may match.
        short, think: Rewards of right answers.
        wrong_short, wrong_think, format_error: Rewards of the others.

    Example:
        >>> reward = mode_reward(lambda answer, solution: answer.strip() == solution, think=0.8)
    """

    def reward(
        completions: Sequence[Any],
        thinkless_mode: Sequence[str | None] | None = None,
        thinkless_answer: Sequence[str | None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if thinkless_mode is None or thinkless_answer is None:
            raise ValueError("mode_reward reads what the plugin 'thinkless' finds in a rollout; enable that plugin.")
        if reference not in columns:
            raise ValueError(
                f"mode_reward compares answers with the column {reference!r}, which the data lacks; it is called with "
                f"{', '.join(columns) or 'no column'}. Name the right one: mode_reward(..., reference=COLUMN)."
            )
        rewards: list[float | None] = []
        for mode, answer, expected in zip(thinkless_mode, thinkless_answer, columns[reference], strict=True):
            right: bool | None = False
            if answer is not None:
                references = expected if isinstance(expected, list | tuple) else [expected]
                verdicts = [correct(answer, one) for one in references]
                right = None if verdicts and all(verdict is None for verdict in verdicts) else any(verdicts)
            if mode is not None and right is not None and log_metric is not None:
                log_metric(f"thinkless/accuracy_{mode}", float(right))
            if mode is None or answer is None:
                rewards.append(format_error)
            elif right is None:
                rewards.append(None)
            elif mode == "short":
                rewards.append(short if right else wrong_short)
            else:
                rewards.append(think if right else wrong_think)
        return rewards

    reward.__name__ = "mode_reward"
    return reward


def boxed(text: str) -> str | None:
    """Returns the content of the last \\boxed{...} of a text, braces balanced; None without one."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\{", text)]):
        depth = 1
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[start:place]
    return None


def boxed_match(answer: str, reference: str) -> bool:
    """Says whether the boxed part of an answer is the reference, spaces, `$` and `\\boxed` of the reference aside."""
    given, expected = boxed(answer), boxed(reference) or reference

    def plain(text: str) -> str:
        return re.sub(r"[\s$]", "", text)

    return given is not None and plain(given) == plain(expected)


boxed_reward = mode_reward(boxed_match)
"""`mode_reward` on boxed answers and the column `solution`, to be named in a YAML file as a reward function."""
