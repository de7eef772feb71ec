"""Cases of other sizes and options than in the golden files, for the adapters of GDPO, HDPO, OTC and Thinkless.

What is expected comes from plain loops over floats. Each case passes, and fails once one of its outputs is changed.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Case = dict[str, Any]
Numbers = list[float]


def compare(method: str, case: Case) -> None:
    file = Path(__file__).parent / "adapters" / f"{method}.py"
    spec = importlib.util.spec_from_file_location(f"generated_{method}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.compare(case)


def mean(values: Numbers) -> float:
    return math.fsum(values) / len(values)


def deviation(values: Numbers) -> float:
    return math.sqrt(math.fsum((value - mean(values)) ** 2 for value in values) / (len(values) - 1))


def groups(values: Any, size: int) -> list[Any]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def surrogate(new: float, old: float, advantage: float, low: float, high: float, cap: float) -> tuple[float, float]:
    """The clipped loss of a token and its gradient with respect to the new log-probability."""
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    loss, slope = -advantage * ratio, -advantage * ratio
    if -advantage * clipped > loss:
        loss, slope = -advantage * clipped, 0.0
    if advantage < 0 and loss > -advantage * cap:
        loss, slope = -advantage * cap, 0.0
    return loss, slope


# --- GDPO -------------------------------------------------------------------------------------------------------------


def gdpo(size: int, number: int, rewards: int, condition: bool = False, missing: bool = False) -> Case:
    random.seed(size * number)
    given = [
        [random.choice([-3.0, 0.0, 1.5, random.gauss(0, 9)]) for _ in range(rewards)] for _ in range(size * number)
    ]
    weights, eps, batch_eps = [random.uniform(-1, 2) for _ in range(rewards)], 3e-3, 5e-2
    inputs: dict[str, Any] = {"num_generations": size, "reward_weights": weights}
    inputs["rewards_per_func"] = copy.deepcopy(given)
    outputs: dict[str, Any] = {}
    if missing:
        inputs["rewards_per_func"][1][0] = None
        given[1][0] = 0.0  # as the official code counts it
    if condition:
        inputs["condition"] = {"target": 1, "on": 0, "threshold": 0.5}
        given = [[row[0], row[1] if row[0] >= 0.5 else 0.0, *row[2:]] for row in given]
        outputs["rewards_used"] = given
    columns = []
    for column in zip(*given, strict=True):
        parts = groups(column, size)
        columns.append(
            [(r - mean(part)) / (deviation(part) + eps) if size > 1 else None for part in parts for r in part]
        )
    outputs["per_reward_advantages"] = [list(row) for row in zip(*columns, strict=True)]
    total = [math.fsum(w * (a or 0.0) for w, a in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)]
    outputs["pre_bn_advantages"] = total
    outputs["advantages_official"] = [(s - mean(total)) / (deviation(total) + batch_eps) for s in total]
    if not missing:
        outputs["advantages_trl116"] = outputs["advantages_official"]
    settings = {"group_eps": eps, "batch_eps": batch_eps, "ddof": 1}
    return {"name": "made", "variant": "trl", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}


def gdpo_verl() -> Case:
    random.seed(1)
    size, eps, var_eps = 5, 1e-5, 1e-4
    scores = [[random.gauss(0, 1), random.gauss(3, 2)] for _ in range(15)]
    lengths = [random.randint(0, 9) for _ in scores]
    total = [0.0] * len(scores)
    for column in zip(*scores, strict=True):
        values = [(r - mean(part)) / (deviation(part) + eps) for part in groups(column, size) for r in part]
        total = [s + value for s, value in zip(total, values, strict=True)]
    tokens = [s for s, length in zip(total, lengths, strict=True) for _ in range(length)]
    centre, scale = mean(tokens), 1 / math.sqrt(deviation(tokens) ** 2 + var_eps)
    expected = [[(s - centre) * scale * (t < n) for t in range(11)] for s, n in zip(total, lengths, strict=True)]
    inputs = {"scores": scores, "lengths": lengths, "T": 11, "num_generations": size}
    settings = {"group_eps": eps, "var_eps": var_eps, "ddof": 1}
    outputs = {"advantages": expected}
    return {"name": "made", "variant": "verl", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}


def gdpo_single() -> Case:
    rewards = [1.0, 4.0, None, 2.0, 5.0, 5.0, 5.0, 1.0]
    known = [0.0 if r is None else 0.5 * r for r in rewards]  # the weight is 0.5
    expected = [(r - mean(part)) / (deviation(part) + 1e-2) for part in groups(known, 4) for r in part]
    inputs = {"rewards_per_func": [[r] for r in rewards], "num_generations": 4, "reward_weights": [0.5]}
    outputs = {"advantages_official": expected}
    return {
        "name": "made",
        "variant": "trl",
        "hyperparameters": {"group_eps": 1e-2},
        "inputs": inputs,
        "outputs": outputs,
    }


# --- HDPO -------------------------------------------------------------------------------------------------------------


def hdpo(size: int, number: int, scale: bool = True, loss: bool = False) -> Case:
    random.seed(10 * size + number)
    rows, eps, high = size * number, 1e-4, 0.3
    settings: dict[str, Any] = {"w_ans": 0.7, "w_fmt": 0.3, "eps": eps, "ddof": 1, "scale_by_std": scale}
    answer = [random.choice([0.0, 0.5, 1.0]) for _ in range(rows)]
    form, calls = [random.random() for _ in range(rows)], [random.randint(0, 30) for _ in range(rows)]
    rewards = [0.7 * a + 0.3 * f for a, f in zip(answer, form, strict=True)]
    lean = [1 / (m + 1) if a > 0 else 0.0 for m, a in zip(calls, answer, strict=True)]
    accuracy: Numbers = []
    tool: Numbers = []
    for part, economy in zip(groups(rewards, size), groups(lean, size), strict=True):
        middle, spread = (mean(part), deviation(part) + eps) if size > 1 else (0.0, 1 + eps)
        accuracy += [(r - middle) / (spread if scale else 1) for r in part]
        right = [r for r in economy if r > 0]
        if len(right) < 2:
            tool += [0.0] * size
            continue
        spread = deviation(right) + eps if scale else 1
        tool += [(r - mean(right)) / spread if r > 0 else 0.0 for r in economy]
    inputs = {"answer_score": answer, "format_score": form, "tool_calls": calls, "num_generations": size}
    outputs: dict[str, Any] = {"acc_reward": rewards, "tool_reward": lean, "acc_advantage": accuracy}
    outputs |= {"tool_advantage": tool, "tool_signal": [int(value != 0) for value in tool]}
    if not loss:
        return {"name": "made", "kind": "advantage", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}
    settings |= {"w_acc": 2.0, "w_tool": 0.4, "clip_ratio_low": 0.1, "clip_ratio_high": high, "clip_ratio_c": 1.6}
    settings["loss_agg"] = "token-mean"
    mask = [[int(t < random.randint(0, 7)) for t in range(7)] for _ in range(rows)]
    old = [[-random.random() if on else -math.inf for on in row] for row in mask]
    new = [
        [value + random.gauss(0, 0.5) if on else None for value, on in zip(*pair, strict=True)]
        for pair in zip(old, mask, strict=True)
    ]
    values, slope = {"acc": 0.0, "tool": 0.0}, [[0.0] * 7 for _ in range(rows)]
    channels = (("acc", 2.0, accuracy, [True] * rows), ("tool", 0.4, tool, [value != 0 for value in tool]))
    for name, weight, advantages, rows_in in channels:
        count = sum(sum(row) for row, counted in zip(mask, rows_in, strict=True) if counted)
        for i, t in [(i, t) for i in range(rows) for t in range(7) if mask[i][t] and rows_in[i]]:
            part, gradient = surrogate(new[i][t] or 0.0, old[i][t], advantages[i], 0.1, high, 1.6)
            values[name] += part / max(count, 1)
            slope[i][t] += weight * gradient / max(count, 1)
    inputs |= {"log_prob": new, "old_log_prob": old, "response_mask": mask}
    outputs |= {"loss_acc": values["acc"], "loss_tool": values["tool"], "grad_log_prob": slope}
    outputs["pg_loss"] = 2.0 * values["acc"] + 0.4 * values["tool"]
    return {"name": "made", "kind": "loss", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}


# --- OTC --------------------------------------------------------------------------------------------------------------


def otc(kind: str) -> Case:
    random.seed(7)
    size, c, alpha = 7, 11, 2.5
    calls = [random.randint(0, 40) for _ in range(5 * size)]
    correct = [int(random.random() < 0.3) for _ in calls]
    correct[:size] = [0] * size
    rewards = [random.gauss(0, 100) for _ in calls]
    before = [None, 3, math.inf, None, 0]
    least: list[int | None] = []
    for b in range(5):
        right = [m for m, ok in zip(groups(calls, size)[b], groups(correct, size)[b], strict=True) if ok]
        known = [m for m in [before[b], *right] if m is not None and not math.isinf(m)]
        least.append(min(known) if known else None)  # type: ignore[arg-type]
    factors = []
    for row, m in enumerate(calls):
        n = least[row // size]
        falling = math.cos(m * math.pi / (2 * m + c)) if m else 1.0
        if kind == "ppo":
            factors.append(falling)
        elif n is None:
            factors.append(1.0)
        else:
            factors.append(falling if n == 0 else math.sin(math.pi * m / (m + n)))
    outputs: dict[str, Any] = {
        "r_tool": factors,
        "reward": [alpha * f * r for f, r in zip(factors, rewards, strict=True)],
    }
    inputs: dict[str, Any] = {"tool_calls": calls, "r_phi": rewards}
    if kind == "grpo":
        inputs |= {"correct": correct, "num_generations": size, "n_prev": before}
        outputs["n"] = least
    return {
        "name": "made",
        "kind": kind,
        "hyperparameters": {"c": c, "alpha": alpha},
        "inputs": inputs,
        "outputs": outputs,
    }


# --- Thinkless --------------------------------------------------------------------------------------------------------


def thinkless(lengths: list[int], alpha: float | None, eps: float) -> Case:
    random.seed(len(lengths))
    width = max(lengths) + 1
    mask = [[int(t < n) for t in range(width)] for n in lengths]
    old = [[-random.random() if on else -math.inf for on in row] for row in mask]
    new = [[-random.random() if on else None for on in row] for row in mask]
    advantages = [random.gauss(0, 2) for _ in lengths]
    tokens = [(i, t) for i, n in enumerate(lengths) for t in range(n)]
    on, total = sum(t == 0 for _, t in tokens), len(tokens)
    parts = {(i, t): surrogate(new[i][t] or 0.0, old[i][t], advantages[i], eps, eps, math.inf) for i, t in tokens}
    inputs = {
        "kind": "policy_loss",
        "log_prob": new,
        "old_log_prob": old,
        "completion_mask": mask,
        "advantages": advantages,
    }
    settings = {"alpha": alpha, "cliprange": eps}

    def weighted(weights: list[list[float]], shares: list[float]) -> tuple[float, list[list[float]]]:
        loss, slope = 0.0, [[0.0] * width for _ in lengths]
        for i, t in tokens:
            loss += weights[i][t] * parts[i, t][0] * shares[i]
            slope[i][t] = weights[i][t] * parts[i, t][1] * shares[i]
        return loss, slope

    outputs: dict[str, Any] = {}
    if alpha is None:
        outputs["loss_official"], outputs["grad_log_prob_official"] = weighted(
            [[1.0] * width] * len(lengths), [1 / total] * len(lengths)
        )
        return {"name": "made", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}
    both = [[0.0] * width for _ in lengths]
    rows = [[0.0] * width for _ in lengths]
    for i, t in tokens:
        both[i][t] = alpha * total / on if t == 0 else total / (total - on)
        rows[i][t] = alpha * lengths[i] if t == 0 else lengths[i] / (lengths[i] - 1)
    outputs |= {"token_mean_weights": both, "sequence_mean_weights": rows}
    loss, slope = weighted(both, [1 / total] * len(lengths))
    outputs |= {"loss_official_guarded": loss, "grad_log_prob_official_guarded": slope}
    outputs |= {
        "loss_official": loss if total > on else "nan",
        "grad_log_prob_official": slope if total > on else "nan",
    }
    loss, slope = weighted(rows, [1 / max(n, 1) / len(lengths) for n in lengths])
    outputs |= {"loss_sequence_mean_form": loss, "grad_log_prob_sequence_mean_form": slope}
    return {"name": "made", "hyperparameters": settings, "inputs": inputs, "outputs": outputs}


def thinkless_advantages(scale: bool) -> Case:
    members = {"x": [0.5, 1.0, -1.0], "only": [0.8], "y": [1.0, 1.0], "z": [-1.0, 0.5, 0.5, 1.0, 1.0]}
    expected = []
    for part in members.values():
        middle, spread = (mean(part), deviation(part)) if len(part) > 1 else (0.0, 1.0)
        expected += [(r - middle) / (spread + 1e-3 if scale else 1) for r in part]
    inputs: dict[str, Any] = {"kind": "advantage", "rewards": [r for part in members.values() for r in part]}
    inputs["group_index"] = [name for name, part in members.items() for _ in part]
    settings = {"std_normalizer": scale, "epsilon": 1e-3}
    return {"name": "made", "hyperparameters": settings, "inputs": inputs, "outputs": {"advantages": expected}}


def thinkless_rewards() -> Case:
    rows = [
        ("<short>\\boxed{5}", "5", 3.0),
        ("<short>\\boxed{6}", "5", -3.0),
        ("<think>so</think>\\boxed{5}", "5", 2.0),
        ("<think>so</think>", "5", -2.0),
        ("<think><short></think>\\boxed{6}", "5", 3.0),  # officially short, and wrong here
        ("", "5", -1.0),
    ]
    settings = {"correct_short_reward": 3.0, "wrong_short_reward": -3.0}
    settings |= {"correct_think_reward": 2.0, "wrong_think_reward": -2.0}
    inputs = {"kind": "reward", "items": [{"text": text, "ground_truth": right} for text, right, _ in rows]}
    return {
        "name": "made",
        "hyperparameters": settings,
        "inputs": inputs,
        "outputs": {"rewards_official": [r for *_, r in rows]},
    }


CASES: dict[str, tuple[str, Callable[[], Case]]] = {
    "gdpo": ("gdpo", lambda: gdpo(3, 5, 4)),
    "gdpo-condition": ("gdpo", lambda: gdpo(9, 2, 3, condition=True)),
    "gdpo-missing": ("gdpo", lambda: gdpo(4, 3, 2, missing=True)),
    "gdpo-alone": ("gdpo", lambda: gdpo(1, 6, 2)),
    "gdpo-single": ("gdpo", gdpo_single),
    "gdpo-verl": ("gdpo", gdpo_verl),
    "hdpo": ("hdpo", lambda: hdpo(5, 7)),
    "hdpo-unscaled": ("hdpo", lambda: hdpo(3, 4, scale=False)),
    "hdpo-alone": ("hdpo", lambda: hdpo(1, 4)),
    "hdpo-loss": ("hdpo", lambda: hdpo(6, 2, loss=True)),
    "hdpo-loss-alone": ("hdpo", lambda: hdpo(1, 5, loss=True)),
    "otc": ("otc", lambda: otc("grpo")),
    "otc-ppo": ("otc", lambda: otc("ppo")),
    "thinkless": ("thinkless", lambda: thinkless([9, 1, 0, 12, 4], 0.3, 0.1)),
    "thinkless-frozen": ("thinkless", lambda: thinkless([2, 3], 0.0, 0.3)),
    "thinkless-control-only": ("thinkless", lambda: thinkless([1, 1, 1, 1], 2.0, 0.2)),
    "thinkless-plain": ("thinkless", lambda: thinkless([3, 8, 1], None, 0.05)),
    "thinkless-advantages": ("thinkless", lambda: thinkless_advantages(False)),
    "thinkless-scaled": ("thinkless", lambda: thinkless_advantages(True)),
    "thinkless-rewards": ("thinkless", thinkless_rewards),
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_another_size(name: str) -> None:
    method, make = CASES[name]
    compare(method, make())


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_number_in_it_is_noticed(name: str) -> None:
    method, make = CASES[name]
    for output in make()["outputs"]:
        case = make()
        if not changed(case["outputs"], output):
            continue
        with pytest.raises(AssertionError):
            compare(method, case)


def changed(values: Any, key: Any) -> bool:
    """Adds 1 to the first number of a nested list, unless it holds none."""
    if isinstance(values[key], list):
        return any(changed(values[key], index) for index in range(len(values[key])))
    if not isinstance(values[key], int | float):
        return False
    values[key] += 1
    return True
