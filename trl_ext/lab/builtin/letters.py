"""Tasks `letters` and `right-letter`: preferences over letters, without and with a question to get right.

`letters` asks for six letters out of twelve, of which four are good, four are bad and four do not matter. The reward is
good minus bad. Pairs for DPO are a better and a worse answer, with the reward of every token beside them.

`right-letter` asks for one letter, and every prompt has one that is right. An answer of one letter is well formed.
"""

from __future__ import annotations

import random
import string
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, final_text, hashed_integer, user

GOOD, BAD, OTHER = "abcd", "wxyz", "klmn"
LENGTH = 6
SMALL = Shape(width=32, layers=2, heads=4, feed_forward=64, positions=32)


def worth(letter: str) -> int:
    """Returns 1 for a good letter, -1 for a bad one, 0 for any other."""
    return (letter in GOOD) - (letter in BAD)


def good_minus_bad(completions: list[Any], **columns: Any) -> list[float]:
    """Returns good letters minus bad ones among the first six. Every letter after those counts as bad."""
    return [float(sum(map(worth, text[:LENGTH])) - len(text[LENGTH:])) for text in map(final_text, completions)]


def letters_behaviour(completions: list[Any], **columns: Any) -> dict[str, list[float | None]]:
    """Reports good letters, bad letters, and answers of the right length."""
    texts = [final_text(completion) for completion in completions]
    return {
        "good": [float(sum(letter in GOOD for letter in text)) for text in texts],
        "bad": [float(sum(letter in BAD for letter in text)) for text in texts],
        "complete": [float(len(text) == LENGTH) for text in texts],
    }


def letters_rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes prompts and pairs: chosen has three good letters and a bad one, rejected one good and three bad ones."""
    random_state = random.Random(f"letters {split} {seed}")
    questions = []
    for _ in range(size):
        better, worse = _mixed(3, 1, random_state), _mixed(1, 3, random_state)
        questions.append(
            {
                "prompt": _topic(random_state),
                "chosen": assistant(better),
                "rejected": assistant(worse),
                "chosen_token_rewards": _token_rewards(better),
                "rejected_token_rewards": _token_rewards(worse),
            }
        )
    return questions


def letters_traces(size: int, seed: int) -> list[Row]:
    """Makes answers in which all twelve letters are equally likely."""
    random_state = random.Random(f"letters traces {seed}")
    return [
        {
            "prompt": _topic(random_state),
            "completion": assistant("".join(random_state.choices(GOOD + BAD + OTHER, k=LENGTH))),
        }
        for _ in range(size)
    ]


def _topic(random_state: random.Random) -> list[dict[str, Any]]:
    """Draws a prompt of three digits."""
    return user("".join(random_state.choices(string.digits, k=3)))


def _mixed(good: int, bad: int, random_state: random.Random) -> str:
    """Draws an answer with so many good and bad letters, in any order."""
    letters = random_state.choices(GOOD, k=good) + random_state.choices(BAD, k=bad)
    letters += random_state.choices(OTHER, k=LENGTH - len(letters))
    random_state.shuffle(letters)
    return "".join(letters)


def _token_rewards(text: str) -> list[float]:
    """Returns a number per token of an answer, the end token included."""
    return [*map(float, map(worth, text)), 0.0]


LETTERS = Task(
    name="letters",
    summary="six letters, some good and some bad; with pairs for DPO",
    trainers=("grpo", "rloo", "dpo"),
    rows=letters_rows,
    rewards=(good_minus_bad,),
    traces=letters_traces,
    behaviour=letters_behaviour,
    shape=SMALL,
    warm_up=WarmUp(traces=4096, steps=300, batch_size=64, learning_rate=5e-3),
    max_completion_length=LENGTH + 2,
)


QUESTIONS, CHOICES = "123456", GOOD + BAD + OTHER


def right_letter(question: str) -> str:
    """Returns the answer to a question of `right-letter`."""
    return CHOICES[hashed_integer(f"right letter {question}", 0, len(CHOICES) - 1)]


def right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Returns 1 where an answer is the right letter and nothing else."""
    return [float(final_text(completion) == letter) for completion, letter in zip(completions, answer, strict=True)]


def well_formed(completions: list[Any], **columns: Any) -> list[float]:
    """Returns 1 where an answer is one letter."""
    return [float(len(text) == 1 and text in CHOICES) for text in map(final_text, completions)]


def right_letter_rows(split: str, size: int, seed: int) -> list[Row]:
    """Repeats the same few questions, in both splits."""
    return [
        {"prompt": user(question), "answer": right_letter(question)}
        for question in (QUESTIONS[number % len(QUESTIONS)] for number in range(size))
    ]


def right_letter_traces(size: int, seed: int) -> list[Row]:
    """Makes answers of any letter to any question, and sometimes of two letters."""
    random_state = random.Random(f"right-letter traces {seed}")
    return [
        {
            "prompt": user(random_state.choice(QUESTIONS)),
            "completion": assistant("".join(random_state.choices(CHOICES, k=random_state.choice([1, 1, 1, 2])))),
        }
        for _ in range(size)
    ]


RIGHT_LETTER = Task(
    name="right-letter",
    summary="six questions with one right letter each, which the warmed-up model does not know",
    trainers=("grpo", "rloo"),
    rows=right_letter_rows,
    rewards=(right, well_formed),
    traces=right_letter_traces,
    shape=SMALL,
    warm_up=WarmUp(traces=4096, steps=150, batch_size=64, learning_rate=5e-3),
    max_completion_length=4,
    train_size=240,
    test_size=48,
)
