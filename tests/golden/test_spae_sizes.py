"""The adapter of SPAE takes cases of any size, with other settings, and notices wrong numbers in them."""

from __future__ import annotations

import importlib.util
import math
import random
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ADAPTER = Path(__file__).parent / "adapters" / "spae.py"
_spec = importlib.util.spec_from_file_location("spae_adapter", ADAPTER)
assert _spec and _spec.loader
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)


def advantage_case(seed: int, groups: int, size: int, most: int, **settings: Any) -> dict[str, Any]:
    """Random rows with up to `most` steps; expected values by plain loops."""
    settings = {
        "alpha": 0.5,
        "xi": 0.5,
        "eps_sat": 0.9,
        "filter_zero_variance_groups": True,
        "tail_mode": "last",
        "eps": 1e-8,
        "std_ddof": 1,
    } | settings
    draw = random.Random(seed)
    rows = range(groups * size)
    rewards = [draw.choice([0.0, 0.1, 1.0]) for _ in rows]
    lengths = [draw.randint(most, 4 * most + 1) for _ in rows]
    ends = [sorted(draw.sample(range(length), draw.randint(0, min(most, length)))) for length in lengths]
    potential = [[draw.uniform(-1, 1.2) for _ in row_ends] for row_ends in ends]
    width = max(lengths) + 2

    out: dict[str, Any] = {"group_advantage": [], "row_kept": []}
    for row in rows:
        group = rewards[row // size * size : row // size * size + size]
        kept = not settings["filter_zero_variance_groups"] or max(group) > min(group)
        out["row_kept"].append(kept)
        out["group_advantage"].append(rewards[row] - fmean(group) if kept else 0.0)
    number_of = []  # of steps, that of a tail included
    for row in rows:
        tail = settings["tail_mode"] == "next" and ends[row] and lengths[row] - 1 > ends[row][-1]
        number_of.append(max(len(ends[row]), 1) + bool(tail))
    last = [count - 1 for count in number_of]
    out["step_index"] = [
        [min(sum(end < j for end in ends[i]), last[i]) if j < lengths[i] else -1 for j in range(width)] for i in rows
    ]
    out["saturated_before_step"] = [
        [sum(phi > settings["eps_sat"] for phi in potential[i][:k]) for k in range(number_of[i])] for i in rows
    ]
    out["saturation_factor"] = [
        [1 - settings["alpha"] * (1 - math.exp(-count)) for count in counts] for counts in out["saturated_before_step"]
    ]
    out["delta_potential"] = [[0.0, *(b - a for a, b in pairwise(phis))] if phis else [] for phis in potential]
    every = [delta for i in rows if out["row_kept"][i] for delta in out["delta_potential"][i]]
    span = max(max(every) - min(every), settings["eps"]) if every else 1.0
    out["delta_normalised"] = [
        [(delta - min(every)) / span if out["row_kept"][i] else None for delta in out["delta_potential"][i]]
        for i in rows
    ]
    mean = fmean(math.exp((delta - min(every)) / span) for delta in every) if every else 0.0
    out["shaping"] = []
    for i in rows:
        bonus = [None if value is None else math.exp(value) - mean for value in out["delta_normalised"][i]]
        none = 0.0 if out["row_kept"][i] else None
        out["shaping"].append(bonus + [none] * (number_of[i] - len(bonus)))
    raw = [[0.0] * width for _ in rows]
    for i in rows:
        for j in range(lengths[i] if out["row_kept"][i] else 0):
            k = out["step_index"][i][j]
            raw[i][j] = out["group_advantage"][i] * out["saturation_factor"][i][k]
            raw[i][j] += settings["xi"] * out["shaping"][i][k]
    tokens = [raw[i][j] for i in rows if out["row_kept"][i] for j in range(lengths[i])]
    centre = fmean(tokens) if tokens else 0.0
    divisor = len(tokens) - settings["std_ddof"]
    std = math.sqrt(sum((value - centre) ** 2 for value in tokens) / divisor) if divisor > 0 else 0.0
    final = [
        [(raw[i][j] - centre) / (std + settings["eps"]) if out["row_kept"][i] and j < lengths[i] else 0.0
         for j in range(width)]
        for i in rows
    ]  # fmt: skip
    inputs = {
        "kind": "advantage",
        "rewards": rewards,
        "num_generations": size,
        "step_end_index": ends,
        "completion_lengths": lengths,
        "max_length": width,
        "potential": potential,
    }
    outputs = out | {"advantage_raw": raw, "advantage_final": final}
    return {"inputs": inputs, "outputs": outputs, "hyperparameters": settings}


def paper_case(seed: int, steps: int, probes: int, answer: int) -> dict[str, Any]:
    draw = random.Random(seed)
    entropies = [[[draw.uniform(0, 9) for _ in range(draw.randint(0, 4))] for _ in range(probes)] for _ in range(steps)]
    probabilities = [[draw.choice([0.0, 1.0, draw.random()]) for _ in range(answer)] for _ in range(steps)]
    conf = [sum(math.exp(-fmean(sample)) for sample in samples if sample) / probes for samples in entropies]
    acc = [fmean(values) for values in probabilities]
    phi = [1.5 * a * c + 0.5 * a - c for a, c in zip(acc, conf, strict=True)]
    outputs = {
        "acc": acc,
        "conf": conf,
        "potential": phi,
        "delta_potential": [0.0, *(after - before for before, after in pairwise(phi))],
    }
    inputs = {"kind": "paper_probe", "probe_entropies": entropies, "answer_token_probs": probabilities}
    return {"inputs": inputs, "outputs": outputs, "hyperparameters": {}}


def script_case(steps: int, probes: int, right: bool) -> dict[str, Any]:
    """Every continuation says the one token of the answer for sure, so that each step is known; no thinking end."""
    outputs = {
        "boundary_token_index": list(range(1, 2 * steps, 2)),
        "acc_per_sample": [[1.0] * probes] * steps,
        "conf_per_sample": [[1.0] * probes] * steps,
        "acc": [1.0] * steps,
        "conf": [1.0] * steps,
        "potential": [1.0] * steps,
        "delta_potential": [0.0] * steps,
        "solving_tokens": 1 if right else 0,
        "checking_tokens": 2 * steps if right else 0,
        "right_to_wrong": not right,
        "final_answer_found": right,
    }
    inputs = {
        "kind": "official_probe",
        "vocabulary": ["word", "end!!", "4"],
        "completion_token_ids": [0, 1] * steps + [0],
        "answer_token_ids": [2],
        "final_answer_matches": right,
        "top_logprobs": [[[{"4": 0.0}]] * probes] * steps,
    }
    settings = {
        "step_suffix": "!!",
        "think_end": "</think>",
        "num_probes": probes,
        "max_probe_tokens": 3,
        "temperature": 1.0,
        "top_logprobs": 4,
        "missing_logprob": -20,
        "saturation_threshold": 0.7,
    }
    return {"inputs": inputs, "outputs": outputs, "hyperparameters": settings}


ADVANTAGES = [
    advantage_case(1, groups=1, size=2, most=1),
    advantage_case(2, groups=4, size=7, most=9),
    advantage_case(3, groups=6, size=2, most=3, tail_mode="next", alpha=1.0, xi=0.1),
    advantage_case(4, groups=3, size=5, most=4, filter_zero_variance_groups=False, eps=1e-3, eps_sat=0.2),
    advantage_case(5, groups=2, size=3, most=2, std_ddof=0, xi=0.0),
    advantage_case(6, groups=5, size=1, most=2),  # no group has two rows, so nothing is kept
]
OTHERS = [paper_case(7, 1, 1, 1), paper_case(8, 6, 3, 5), script_case(4, 2, True), script_case(1, 7, False)]


@pytest.mark.parametrize("case", ADVANTAGES + OTHERS, ids=lambda case: case["inputs"]["kind"])
def test_a_case_of_another_size_passes(case: dict[str, Any]) -> None:
    adapter.compare(case)


def test_rows_without_a_reward_are_left_out() -> None:
    """A row more, in a group of its own, changes nothing of the others."""
    case = advantage_case(2, groups=4, size=7, most=9)
    inputs, outputs = case["inputs"], case["outputs"]
    for _ in range(7):
        inputs["rewards"].append(None)
        inputs["step_end_index"].append([1])
        inputs["completion_lengths"].append(3)
        inputs["potential"].append([0.4])
        outputs["group_advantage"].append(0.0)
        outputs["row_kept"].append(False)
        outputs["step_index"].append([0] * 3 + [-1] * (inputs["max_length"] - 3))
        for name, value in (("saturated_before_step", 0), ("saturation_factor", 1.0), ("delta_potential", 0.0)):
            outputs[name].append([value])
        outputs["delta_normalised"].append([None])
        outputs["shaping"].append([None])
        for name in ("advantage_raw", "advantage_final"):
            outputs[name].append([0.0] * inputs["max_length"])
    adapter.compare(case)


@pytest.mark.parametrize("case", ADVANTAGES[1:5], ids=range(4))
@pytest.mark.parametrize(
    "name", ["group_advantage", "saturation_factor", "shaping", "advantage_raw", "advantage_final"]
)
def test_a_wrong_number_is_noticed(name: str, case: dict[str, Any]) -> None:
    row = next(row for row, kept in enumerate(case["outputs"]["row_kept"]) if kept)
    values = case["outputs"][name]
    entries, at = (values[row], 0) if isinstance(values[row], list) else (values, row)
    kept, entries[at] = entries[at], 0.7654
    with pytest.raises(AssertionError):
        adapter.compare(case)
    entries[at] = kept
