"""Questions about a small corpus, of which the model knows a part by heart.

`near:ab` asks for what the corpus has under `ab`, a key of the part that the warmed-up model knows by heart. `far:cd`
asks the same of the part that it has never seen: it must look up, once or, for `far:far:cd`, the entry of the entry,
twice. An answer is `=ef`. The model looks up nearly always, though on near entries every call could be saved.
"""

from __future__ import annotations

import itertools
import random
import string
from typing import Any

from ..definition import Row, Shape, Task, WarmUp
from ..messages import assistant, by_kind, call, calls_made, drawn, final_text, in_split, result, user

KEYS = tuple(map("".join, itertools.product(string.ascii_lowercase, repeat=2)))
NEAR = tuple(key for key in KEYS if key[0] in "aeiou" and key[1] in "bcdfg")
FAR = tuple(key for key in KEYS if key[0] not in "aeiou")
CORPUS = {key: KEYS[drawn(f"corpus {key}", 0, len(KEYS) - 1)] for key in KEYS}
KINDS = ("near", "far", "near", "chain")
LOOKS_UP = 0.9
"""Share of the answers for which the traces use the tool."""
KNOWLEDGE = 0.25
"""Share of the traces that teach the near entries and leave the choice between answer and look-up alone."""


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
    """1 where the last message is `=` and the entry."""
    return [float(final_text(completion) == f"={right}") for completion, right in zip(completions, answer, strict=True)]


def behaviour(
    completions: list[Any], kind: list[str], answer: list[str], **columns: Any
) -> dict[str, list[float | None]]:
    """Calls and right answers by kind of question, and right answers without a call."""
    calls = [float(calls_made(completion)) for completion in completions]
    right = correct(completions, answer)
    alone = [value if not made else None for value, made in zip(right, calls, strict=True)]
    return by_kind(kind, calls, "calls") | by_kind(kind, right, "correct") | by_kind(kind, alone, "correct_alone")


def rows(split: str, size: int, seed: int) -> list[Row]:
    """The kinds in turn. Far keys of the two splits differ; the near ones are the same twenty-five."""
    random_state = random.Random(f"lookup {split} {seed}")
    far = [key for key in FAR if in_split(key, split)]
    found = []
    for number in range(size):
        kind = KINDS[number % len(KINDS)]
        key = random_state.choice(NEAR if kind == "near" else far)
        answer = CORPUS[CORPUS[key]] if kind == "chain" else CORPUS[key]
        found.append({"prompt": user(_question(kind, key)), "answer": answer, "kind": kind})
    return found


def traces(size: int, seed: int) -> list[Row]:
    """Far entries are made up for every trace, so that the model learns to look and not the corpus."""
    random_state = random.Random(f"lookup traces {seed}")
    found = []
    for number in range(size):
        if random_state.random() < KNOWLEDGE:
            key = random_state.choice(NEAR)
            found.append({"prompt": user(f"near:{key}"), "completion": assistant(CORPUS[key], prefix="=")})
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
        found.append({"prompt": user(_question(kind, key)), "completion": turns + assistant(f"={steps[-1]}")})
    return found


def _question(kind: str, key: str) -> str:
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
