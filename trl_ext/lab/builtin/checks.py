"""Task `checks`: calculations with redundant checks after the answer.

`3+4*7` (from left to right, last digit) is worked out as

    <think>3+4=7.

    7*7=9.

    So 9.

    Wait.

    So 9.

    </think>\\boxed{9}

with any number of checks. One check in twenty-five spoils the answer. `Wait` and the end of a step are one token each.
The warmed-up model also answers a probe: after `PROBE`, at the end of a step, it gives the answer, which is a guess
until it has been worked out.
"""

from __future__ import annotations

import random
import re
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, final_text, in_split, user
from .chains import Chain

THINK, THOUGHT, STEP_END, CHECK, CONCLUSION, BOX = "<think>", "</think>", ".\n\n", "Wait", "So ", "\\boxed{"
PROBE = f"**Final Answer**\n{BOX}"
SPLIT_WORDS = ("Wait", "But", "Alternatively", "Hmm", "Let", "Therefore")
STEPS = (2, 3)
GOES_ON, MOST_CHECKS, SPOILS, PROBED = 0.7, 6, 0.04, 0.2
"""Probability of one more check, the most checks, probability that a check spoils the answer, share of probes."""

_BOXED = re.compile(rf"{THINK}[^<]*{THOUGHT}\\boxed\{{(\d)\}}")


def correct(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Returns 1 where the boxed digit after the thought is the answer."""
    matches = [_BOXED.fullmatch(final_text(completion)) for completion in completions]
    return [float(match is not None and match[1] == right) for match, right in zip(matches, answer, strict=True)]


def states_answer(problem: Any, segment: str, answer: str) -> bool:
    """Judges whether a segment of a thought states the right answer, for methods that cut thoughts into segments."""
    return f"{CONCLUSION}{answer}." in segment


def behaviour(completions: list[Any], answer: list[str], **columns: Any) -> dict[str, list[float | None]]:
    """Reports steps before the first conclusion, checks after it, and thoughts that had the answer and lost it."""
    texts = [final_text(completion) for completion in completions]
    right = correct(completions, answer)
    had_it = [states_answer(None, text, letter) for text, letter in zip(texts, answer, strict=True)]
    return {
        "steps": [float(text.partition(CONCLUSION)[0].count("=")) for text in texts],
        "checks": [float(text.count(CHECK)) for text in texts],
        "lost": [float(had and not value) for had, value in zip(had_it, right, strict=True)],
    }


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes questions of two and three steps in turn. The splits share no question."""
    random_state = random.Random(f"checks {split} {seed}")
    questions: list[Row] = []
    while len(questions) < size:
        chain = Chain.draw(STEPS[len(questions) % len(STEPS)], random_state)
        if in_split(chain.text, split):
            questions.append({"prompt": user(chain.text), "answer": chain.answer})
    return questions


def traces(size: int, seed: int) -> list[Row]:
    """Makes worked-out calculations, and probes at the end of one of their steps."""
    random_state = random.Random(f"checks traces {seed}")
    examples: list[Row] = []
    while len(examples) < size:
        chain = Chain.draw(random_state.choice(STEPS), random_state)
        if not in_split(chain.text, "train"):
            continue
        steps, answers = _worked_out(chain, random_state)
        if random_state.random() < PROBED:
            shown = random_state.randint(1, len(steps))
            given = answers[shown - 1] or str(random_state.randrange(10))
            completion = assistant(f"{given}}}", prefix=THINK + "".join(steps[:shown]) + PROBE)
        else:
            completion = assistant(f"{THINK}{''.join(steps)}{THOUGHT}{BOX}{answers[-1]}}}")
        examples.append({"prompt": user(chain.text), "completion": completion})
    return examples


def _worked_out(chain: Chain, random_state: random.Random) -> tuple[list[str], list[str]]:
    """Returns the steps of a thought, and the answer after each of them, empty before it is worked out."""
    values = [chain.first, *chain.values]
    steps = [
        f"{before}{operation}={after}{STEP_END}"
        for before, operation, after in zip(values, chain.operations, values[1:], strict=False)
    ]
    answers = [""] * (len(steps) - 1) + [chain.answer]
    answer = chain.answer
    steps.append(f"{CONCLUSION}{answer}{STEP_END}")
    answers.append(answer)
    checks = 0
    while checks < MOST_CHECKS and random_state.random() < GOES_ON:
        checks += 1
        steps.append(f"{CHECK}{STEP_END}")
        answers.append(answer)
        if random_state.random() < SPOILS:
            answer = str(random_state.randrange(10))
        steps.append(f"{CONCLUSION}{answer}{STEP_END}")
        answers.append(answer)
    return steps, answers


CHECKS = Task(
    name="checks",
    summary="calculations worked out step by step, with needless checks after the answer",
    trainers=("grpo", "rloo"),
    rows=rows,
    rewards=(correct,),
    traces=traces,
    behaviour=behaviour,
    words=(
        *(THINK, THOUGHT, STEP_END, CONCLUSION, BOX, "**Final Answer**", "\n\n"),
        *(f"{space}{word}" for word in SPLIT_WORDS for space in ("", " ")),
    ),
    shape=Shape(width=64, layers=2, heads=4, feed_forward=192, positions=96),
    warm_up=WarmUp(traces=12288, steps=1200, batch_size=32, learning_rate=5e-3),
    max_completion_length=60,
)
