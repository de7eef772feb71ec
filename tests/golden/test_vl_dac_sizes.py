"""The adapter of VL-DAC takes cases of any size, with other settings, and notices wrong numbers in them."""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

ADAPTER = Path(__file__).parent / "adapters" / "vl_dac.py"
_spec = importlib.util.spec_from_file_location("vl_dac_adapter", ADAPTER)
assert _spec and _spec.loader
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)


def normalised(values: list[float]) -> list[Any]:
    """One step has no deviation: the authors' code gets NaN there, which the files write as a text."""
    if len(values) < 2:
        return ["nan"] * len(values)
    return [(value - fmean(values)) / (stdev(values) + 1e-8) for value in values]


def recursion(
    rewards: list[float],
    values: list[float],
    done: list[bool],
    truncated: list[bool],
    bootstrap: float,
    gamma: float,
    lam: float,
) -> list[float]:
    out = [0.0] * len(rewards)
    following, ahead = 0.0, bootstrap
    for k in reversed(range(len(rewards))):
        goes_on = 0.0 if done[k] else 1.0
        following = rewards[k] + gamma * ahead * goes_on - values[k] + gamma * lam * goes_on * following
        following = 0.0 if truncated[k] else following
        out[k], ahead = following, values[k]
    return out


def buffer(draw: random.Random, steps: int, values: str) -> dict[str, Any]:
    done = [draw.random() < 0.3 for _ in range(steps)]
    return {
        "rewards": [draw.choice([0, 1, draw.uniform(-1, 1)]) for _ in range(steps)],
        values: [draw.uniform(-1, 1) for _ in range(steps)],
        "bootstrap_value": draw.uniform(-1, 1),
        "done": done,
        "truncated": [end and draw.random() < 0.5 for end in done],
    }


def gae_case(seed: int, steps: int, **settings: Any) -> dict[str, Any]:
    settings = {"gamma": 0.9, "gae_lambda": 0.8, "use_gae": True, "use_proper_time_limits": True} | settings
    made = buffer(random.Random(seed), steps, "values")
    limits = made["truncated"] if settings["use_proper_time_limits"] else [False] * steps
    lam = settings["gae_lambda"] if settings["use_gae"] else 1.0
    raw = recursion(
        made["rewards"], made["values"], made["done"], limits, made["bootstrap_value"], settings["gamma"], lam
    )
    outputs = {
        "advantages": raw,
        "returns": [a + v for a, v in zip(raw, made["values"], strict=True)],
        "advantages_normalised": normalised(raw),
    }
    return {"inputs": {"kind": "gae", **made}, "outputs": outputs, "hyperparameters": settings}


def update_case(seed: int, steps: int, spread: float, **settings: Any) -> dict[str, Any]:
    """Losses and gradients by loops. `spread` says how far the policy has moved."""
    settings = {
        "gamma": 0.97,
        "gae_lambda": 0.9,
        "clip": 0.2,
        "value_loss_coef": 0.3,
        "kl_beta": 0.1,
        "only_value_loss": False,
        "use_clipped_value_loss": True,
    } | settings
    draw = random.Random(seed)
    made = buffer(draw, steps, "values_old")
    lengths = [draw.randint(1, 6) for _ in range(steps)]
    old = [[draw.uniform(-3, -0.1) for _ in range(length)] for length in lengths]
    new, ref = ([[lp + draw.uniform(-spread, spread) for lp in lps] for lps in old] for _ in range(2))
    moved = [v + draw.uniform(-1, 1) for v in made["values_old"]]
    raw = recursion(
        made["rewards"], made["values_old"], made["done"], made["truncated"], made["bootstrap_value"],
        settings["gamma"], settings["gae_lambda"],
    )  # fmt: skip
    normal = [float(value) for value in normalised(raw)]
    returns = [a + v for a, v in zip(raw, made["values_old"], strict=True)]
    eps, losses, by_values, by_logps = settings["clip"], [], [], []
    for k in range(steps):
        change = min(max(moved[k] - made["values_old"][k], -eps), eps)
        free, bound = moved[k] - returns[k], made["values_old"][k] + change - returns[k]
        clipped = settings["use_clipped_value_loss"] and bound**2 > free**2
        value = settings["value_loss_coef"] * (bound if clipped else free) ** 2
        inside = abs(moved[k] - made["values_old"][k]) <= eps
        by_values.append(settings["value_loss_coef"] * 2 * ((bound if inside else 0.0) if clipped else free))
        ratios = [math.exp(a - b) for a, b in zip(new[k], old[k], strict=True)]
        policy, slopes = 0.0, []
        for ratio, lp, reference in zip(ratios, new[k], ref[k], strict=True):
            limited = min(max(ratio, 1 - eps), 1 + eps)
            alone = max(ratios) > 10
            free_term, bound_term = -normal[k] * ratio, -normal[k] * limited
            is_bound = alone or bound_term > free_term
            surrogate = bound_term if is_bound else free_term
            difference = reference - lp
            policy += surrogate + settings["kl_beta"] * (math.exp(difference) - difference - 1)
            slope = 0.0 if is_bound and ratio != limited else -normal[k] * ratio
            slopes.append((slope + settings["kl_beta"] * (1 - math.exp(difference))) / lengths[k])
        alive = 0.0 if settings["only_value_loss"] else 1.0
        losses.append(alive * policy / lengths[k] + value)
        by_logps.append([alive * slope for slope in slopes])
    outputs = {
        "advantages": raw,
        "returns": returns,
        "advantages_normalised": normal,
        "loss_per_step": losses,
        "loss_mean_over_steps": fmean(losses),
        "grad_log_prob_per_step": by_logps,
        "grad_value_per_step": by_values,
    }
    inputs = {
        "kind": "update",
        **made,
        "old_log_prob": old,
        "log_prob": new,
        "ref_log_prob": ref,
        "values_new": moved,
    }
    return {"inputs": inputs, "outputs": outputs, "hyperparameters": settings}


def rows_case(seed: int, rows: int, most: int, gamma: float, lam: float) -> dict[str, Any]:
    """Rows of 0 to `most` steps with tokens of tools between them."""
    draw = random.Random(seed)
    masks, starts, counts = [], [], []
    for row in range(rows):
        mask = [0] * draw.randint(0, 2)
        starts.append([])
        counts.append([])
        for _ in range(draw.randint(0, most) if row else most):
            starts[-1].append(len(mask))
            counts[-1].append(draw.randint(1, 4))
            mask += [1] * counts[-1][-1] + [0] * draw.randint(1, 3)
        masks.append(mask)
    lengths = [len(mask) for mask in masks]
    width = max(lengths)
    rewards, values = ([[draw.uniform(-1, 1) for _ in row] for row in starts] for _ in range(2))
    terminated = [draw.random() < 0.6 for _ in range(rows)]
    raw = []
    for own, v, end in zip(rewards, values, terminated, strict=True):
        last = [k == len(own) - 1 for k in range(len(own))]
        raw.append(recursion(own, v, last, [here and not end for here in last], 0.0, gamma, lam))
    flat = iter(normalised([a for own in raw for a in own]))
    normal = [[next(flat) for _ in own] for own in raw]
    total, steps = sum(map(sum, masks)), sum(map(len, starts))
    index = [[-1] * width for _ in range(rows)]
    advantages, weights = ([[0.0] * width for _ in range(rows)] for _ in range(2))
    for row in range(rows):
        for k, (start, count) in enumerate(zip(starts[row], counts[row], strict=True)):
            for token in range(start, start + count):
                index[row][token], advantages[row][token] = k, normal[row][k]
                weights[row][token] = total / (steps * count)
    outputs = {
        "step_index": index,
        "step_start": starts,
        "step_token_count": counts,
        "advantages": raw,
        "returns": [[a + v for a, v in zip(*own, strict=True)] for own in zip(raw, values, strict=True)],
        "advantages_normalised": normal,
        "token_advantages": advantages,
        "step_mean_weights": weights,
    }
    inputs = {
        "kind": "rows",
        "tool_mask": [mask + [0] * (width - len(mask)) for mask in masks],
        "completion_lengths": lengths,
        "step_rewards": rewards,
        "step_values": values,
        "terminated": terminated,
    }
    return {"inputs": inputs, "outputs": outputs, "hyperparameters": {"gamma": gamma, "gae_lambda": lam}}


def positions_case(seed: int, prompt: int, tokens: int, width: int, vocabulary: int) -> dict[str, Any]:
    draw = random.Random(seed)
    hidden = [[draw.gauss(0, 1) for _ in range(width)] for _ in range(prompt + tokens)]
    logits = [[draw.gauss(0, 3) for _ in range(vocabulary)] for _ in range(prompt + tokens)]
    weight, ids = [draw.gauss(0, 1) for _ in range(width)], [draw.randrange(vocabulary) for _ in range(tokens)]
    logps = []
    for place, token in enumerate(ids, prompt - 1):
        logps.append(logits[place][token] - math.log(sum(map(math.exp, logits[place]))))
    official = [0.0 if token == 2 else round(lp, 2) for lp, token in zip(logps[1:], ids[1:], strict=True)]
    outputs = {
        "value": sum(w * h for w, h in zip(weight, hidden[prompt - 1], strict=True)),
        "token_log_probs_official_bf16": official,
        "token_log_probs_all_action_tokens": logps,
    }
    inputs = {
        "kind": "read_positions",
        "prompt_length": prompt,
        "action_token_ids": ids,
        "hidden_states": hidden,
        "logits": logits,
        "value_weight": weight,
    }
    return {"inputs": inputs, "outputs": outputs, "hyperparameters": {"pad_token_id_in_official_mask": 2}}


CASES = [
    gae_case(1, 1),
    gae_case(2, 17, gamma=1.0, gae_lambda=0.0),
    gae_case(3, 9, use_gae=False, use_proper_time_limits=False),
    update_case(4, 2, 0.01),
    update_case(5, 11, 0.8, use_clipped_value_loss=False, clip=0.05),
    update_case(6, 8, 3.0, kl_beta=0.0),
    update_case(7, 5, 0.5, only_value_loss=True),
    update_case(12, 1, 0.5),
    rows_case(8, rows=1, most=1, gamma=0.5, lam=0.5),
    rows_case(9, rows=6, most=7, gamma=1.0, lam=0.9),
    positions_case(10, prompt=1, tokens=1, width=2, vocabulary=3),
    positions_case(11, prompt=6, tokens=9, width=5, vocabulary=7),
]
NAMES = [f"{case['inputs']['kind']}-{number}" for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_case_of_another_size_passes(case: dict[str, Any]) -> None:
    adapter.compare(case)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_wrong_number_is_noticed(case: dict[str, Any]) -> None:
    """In every output but the rounded one; NaN has no right number."""
    checked = 0
    for name in case["outputs"].keys() - {"token_log_probs_official_bf16"}:
        entries: Any = case["outputs"]
        key: Any = name
        while isinstance(entries[key], list):  # the first entry of the first row that has one
            entries, key = entries[key], next((i for i, x in enumerate(entries[key]) if x != []), 0)
            if not entries:
                break
        if not entries or math.isnan(float(entries[key])):
            continue
        before, entries[key] = entries[key], entries[key] + 1
        with pytest.raises(AssertionError):
            adapter.compare(case)
        entries[key] = before
        checked += 1
    assert checked >= 2
