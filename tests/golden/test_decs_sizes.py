"""The adapter of DECS takes cases of any size, with other settings, and notices wrong numbers in them."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest

ADAPTER = Path(__file__).parent / "adapters" / "decs.py"
_spec = importlib.util.spec_from_file_location("decs_adapter", ADAPTER)
assert _spec and _spec.loader
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)


def advantage_case(seed: int, groups: int, size: int, width: int, ddof: int = 1, **settings: Any) -> dict[str, Any]:
    """Random rows; expected values by plain loops."""
    draw = random.Random(seed)
    rows = groups * size
    lengths = [draw.randint(0, width) for _ in range(rows)]
    correct = [float(draw.random() < 0.7) for _ in range(rows)]
    spans: list[list[int] | None] = []
    for length, right in zip(lengths, correct, strict=True):
        start = draw.randint(0, max(length - 1, 0))
        spans.append([start, draw.randint(start, length)] if right and length and draw.random() < 0.6 else None)
    settings = {"r_plus": 1.1, "r_zero": 1.0, "L_max": 2 * width, "eps": 1e-6, "ddof": ddof} | settings
    outputs: dict[str, Any] = {}
    gap = settings["r_plus"] - settings["r_zero"]
    for form in ("official", "eq9"):
        rewards = []
        for length, right, span in zip(lengths, correct, spans, strict=True):
            share = length / settings["L_max"]
            low = settings["r_zero"] + gap * (1 - share) if form == "official" else settings["r_zero"] - gap * share
            inside = range(*span) if span else ()
            rewards.append([right * (low if j in inside else settings["r_plus"]) for j in range(width)])
        advantages = [[0.0] * width for _ in range(rows)]
        for row in range(rows):
            group = rewards[row // size * size : row // size * size + size]
            for j in range(lengths[row]):
                column = [other[j] for other in group]
                if size == 1:
                    advantages[row][j] = column[0] / (1 + settings["eps"])
                    continue
                mean = sum(column) / size
                std = math.sqrt(sum((value - mean) ** 2 for value in column) / (size - ddof))
                advantages[row][j] = (rewards[row][j] - mean) / (std + settings["eps"])
        outputs |= {f"token_reward_{form}": rewards, f"advantage_{form}": advantages}
    inputs = {
        "correct": correct,
        "redundant_span": spans,
        "lengths": lengths,
        "T": width,
        "num_generations": size,
    }
    return {"kind": "advantage", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}


def schedule_case(seed: int, rounds: int, lr: float, kappa_init: float, doses: int) -> dict[str, Any]:
    draw = random.Random(seed)
    ratios, caps = ([draw.random() for _ in range(rounds)] for _ in range(2))
    official, clipped, previous = [kappa_init], [kappa_init], 0.4
    for ratio, cap in zip(ratios, caps, strict=True):
        official.append(official[-1] + lr * (ratio - previous))
        clipped.append(min(max(clipped[-1] + lr * (ratio - previous), 0.0), cap))
        previous = ratio
    kappas = [draw.uniform(-0.3, 0.95) for _ in range(doses)]
    kept, available = ([draw.randint(0, 60) for _ in range(doses)] for _ in range(2))
    easy = [
        min(there, math.floor(kappa * mixed / (1 - kappa))) if kappa > 0 else 0
        for kappa, mixed, there in zip(kappas, kept, available, strict=True)
    ]
    return {
        "kind": "schedule",
        "hyperparameters": {"lr": lr, "kappa_init": kappa_init, "ratio_init": 0.4},
        "inputs": {"nrp_ratio": ratios, "kappa_cap": caps, "kappa": kappas, "kept": kept, "available": available},
        "outputs": {"kappa_official": official[1:], "kappa_eq11": clipped[1:], "n_easy": easy},
    }


SPLIT, BREAK, END, ANSWER = 90, 91, 92, 93


def spans_case() -> dict[str, Any]:
    """Seven chunks of three tokens with a line break inside, the answer in the third and the sixth; and no token."""
    chunk = [SPLIT, 1, BREAK, 2]
    long = [token for number in range(7) for token in (*chunk, ANSWER if number in (2, 5) else 3)] + [END, 4, ANSWER]
    outputs = {
        "chunk_ends": [[5, 10, 15, 20, 25, 30, 35], [0], [3]],
        "chunk_types": [list("bbaccdc"), ["b"], ["b"]],
        "redundant_span": [[15, 35], None, None],
        "nrp_chunk_ratio": [3 / 7, 0.0, 0],
    }
    inputs = {
        "completion_ids": [long, [], [1, ANSWER, 2]],
        "correct": [1, 1, 0],
        "split_ids": [SPLIT, 94],
        "newline_ids": [BREAK],
        "think_end_id": END,
        "answer_id": ANSWER,
    }
    return {"kind": "spans", "hyperparameters": {}, "inputs": inputs, "outputs": outputs}


CASES = [
    *(advantage_case(seed, groups=seed, size=2 + 3 * seed, width=5 * seed) for seed in (1, 2, 3)),
    advantage_case(4, groups=5, size=1, width=3),
    advantage_case(5, groups=2, size=7, width=40, r_plus=2.0, r_zero=0.3, eps=1e-3, L_max=4096),
    advantage_case(6, groups=3, size=4, width=9, ddof=0),
    schedule_case(7, rounds=1, lr=0.05, kappa_init=0.0, doses=1),
    schedule_case(8, rounds=12, lr=0.5, kappa_init=0.3, doses=30),
    schedule_case(9, rounds=3, lr=3.0, kappa_init=0.9, doses=0),
    spans_case(),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["kind"])
def test_a_case_of_another_size_passes(case: dict[str, Any]) -> None:
    adapter.compare(case)


def test_rows_without_a_reward_and_rounds_without_a_ratio() -> None:
    case = advantage_case(1, groups=1, size=4, width=4)
    case["inputs"]["correct"][1] = None
    for form in ("official", "eq9"):
        rows = [0, 2, 3]
        rest = advantage_case(1, groups=1, size=4, width=4)["outputs"][f"token_reward_{form}"]
        advantages = [[0.0] * 4 for _ in range(4)]
        for j in range(4):
            column = [rest[row][j] for row in rows]
            mean = sum(column) / 3
            std = math.sqrt(sum((value - mean) ** 2 for value in column) / 2)
            for row in rows:
                if j < case["inputs"]["lengths"][row]:
                    advantages[row][j] = (rest[row][j] - mean) / (std + 1e-6)
        case["outputs"][f"token_reward_{form}"][1] = [None] * 4
        case["outputs"][f"advantage_{form}"] = advantages
    adapter.compare(case)
    case = schedule_case(8, rounds=5, lr=0.2, kappa_init=0.3, doses=1)
    case["inputs"]["nrp_ratio"][2] = None
    case["outputs"]["kappa_official"][2:] = [math.nan] * 3
    adapter.compare(case)


@pytest.mark.parametrize("case", CASES[:4] + CASES[5:9], ids=lambda case: case["kind"])
def test_a_wrong_number_is_noticed(case: dict[str, Any]) -> None:
    """The last entry of the first output that the plugin has itself."""
    name = "kappa_eq11" if case["kind"] == "schedule" else "token_reward_eq9"
    values = case["outputs"][name]
    entries = values if isinstance(values[-1], float) else values[-1]
    kept, entries[-1] = entries[-1], 0.5
    with pytest.raises(AssertionError):
        adapter.compare(case)
    entries[-1] = kept
