"""Task `lookup`: questions about a small corpus, of which the model knows a part by heart.

`near:ab` asks for the entry of `ab`, a key of the part that the warmed-up model knows by heart. `far:cd` asks for an
entry that it has never seen, so it must look it up. `far:far:cd` asks for the entry of the entry and takes two
look-ups. An answer is `=ef`. The model nearly always looks up, though on near entries every call could be saved.
"""

from __future__ import annotations

import itertools
import random
import string
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, by_kind, call, calls_made, final_text, hashed_integer, in_split, result, user

KEYS = tuple(map("".join, itertools.product(string.ascii_lowercase, repeat=2)))
NEAR = tuple(key for key in KEYS if key[0] in "aeiou" and key[1] in "bcdfg")
FAR = tuple(key for key in KEYS if key[0] not in "aeiou")
CORPUS = {key: KEYS[hashed_integer(f"corpus {key}", 0, len(KEYS) - 1)] for key in KEYS}
KINDS = ("near", "far", "near", "chain")
LOOKS_UP = 0.9
"""Share of the traces that use the tool."""
KNOWLEDGE = 0.25
"""Share of the traces that teach near entries without teaching whether to answer or to look up."""


def lookup(key: str) -> str:
    """
    Looks a key up in the corpus.

    Args:
        key: Two letters

    Returns:
        The entry
    """
    return CORPUS.get(key, "none")


def correct(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """Returns 1 where the last message is `=` and the entry."""
    return [float(final_text(completion) == f"={right}") for completion, right in zip(completions, answer, strict=True)]


def behaviour(
    completions: list[Any], kind: list[str], answer: list[str], **columns: Any
) -> dict[str, list[float | None]]:
    """Reports calls and right answers by kind of question, and right answers without a call."""
    calls = [float(calls_made(completion)) for completion in completions]
    right = correct(completions, answer)
    alone = [value if not count else None for value, count in zip(right, calls, strict=True)]
    return by_kind(kind, calls, "calls") | by_kind(kind, right, "correct") | by_kind(kind, alone, "correct_alone")


def rows(split: str, size: int, seed: int) -> list[Row]:
    """Makes questions of all kinds in turn. The splits share the twenty-five near keys and no far key."""
    random_state = random.Random(f"lookup {split} {seed}")
    far = [key for key in FAR if in_split(key, split)]
    questions = []
    for number in range(size):
        kind = KINDS[number % len(KINDS)]
        key = random_state.choice(NEAR if kind == "near" else far)
        answer = CORPUS[CORPUS[key]] if kind == "chain" else CORPUS[key]
        questions.append({"prompt": user(_question(kind, key)), "answer": answer, "kind": kind})
    return questions


def traces(size: int, seed: int) -> list[Row]:
    """Makes answers with and without look-ups. Far entries are invented, so that the model learns to look them up."""
    random_state = random.Random(f"lookup traces {seed}")
    examples = []
    for number in range(size):
        if random_state.random() < KNOWLEDGE:
            key = random_state.choice(NEAR)
            examples.append({"prompt": user(f"near:{key}"), "completion": assistant(CORPUS[key], prefix="=")})
            continue
        kind = KINDS[number % len(KINDS)]
        key = random_state.choice(NEAR if kind == "near" else FAR)
        steps = [key, *random_state.choices(KEYS, k=2 if kind == "chain" else 1)]
        if kind == "near":
            steps[1] = CORPUS[key]
        turns: list[dict[str, Any]] = []
        if random_state.random() < LOOKS_UP:
            for asked, entry in itertools.pairwise(steps):
                turns += [call("lookup", key=asked), result("lookup", entry)]
        examples.append({"prompt": user(_question(kind, key)), "completion": turns + assistant(f"={steps[-1]}")})
    return examples


def _question(kind: str, key: str) -> str:
    """Returns the text of a question."""
    return {"near": f"near:{key}", "far": f"far:{key}", "chain": f"far:far:{key}"}[kind]


LOOKUP = Task(
    name="lookup",
    summary="entries of a small corpus: known by heart, one look-up away, or two",
    trainers=("grpo",),
    rows=rows,
    rewards=(correct,),
    traces=traces,
    tools=(lookup,),
    behaviour=behaviour,
    words=("near:", "far:"),
    shape=Shape(width=64, layers=2, heads=4, feed_forward=192, positions=96),
    warm_up=WarmUp(traces=16384, steps=1400, batch_size=48, learning_rate=5e-3),
    max_completion_length=48,
)
