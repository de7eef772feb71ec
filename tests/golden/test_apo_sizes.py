"""The adapter of APO on cases of other sizes and settings, whose numbers come from plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.golden.generated import Case, Draw, adapter, check_notices


def stretched(values: Any, factor: float) -> Any:
    return [stretched(value, factor) for value in values] if isinstance(values, list) else values * factor


def apo_sequence(seed: int, rounds: int, alpha: float, shape: tuple[int, ...], still: bool = False) -> Case:
    draw = Draw(seed)
    reference, updates = number_or_list(draw, shape), [number_or_list(draw, shape) for _ in range(rounds)]
    if still:
        updates = [stretched(update, 0.0) for update in updates]
    theta, steps = torch.tensor(reference, dtype=torch.float64), [torch.tensor(u, dtype=torch.float64) for u in updates]
    starts, hats, wrong = [theta], [], [theta]
    for step in steps:
        hats.append(starts[-1] + step)
        starts.append(hats[-1] + alpha * (hats[-1] - (hats[-2] if len(hats) > 1 else theta)))
        hat = wrong[-1] + step
        wrong.append(hat + alpha * (hat - wrong[-1]))
    outputs = {
        "hats": [hat.tolist() for hat in hats],
        "starts": [start.tolist() for start in starts],
        "released": hats[-1].tolist(),
        "starts_with_wrong_anchor": [start.tolist() for start in wrong],
    }
    inputs = {"theta_ref": reference, "updates": updates}
    return {"hyperparameters": {"kind": "sequence", "alpha": alpha}, "inputs": inputs, "outputs": outputs}


def number_or_list(draw: Draw, shape: tuple[int, ...]) -> Any:
    return draw(*shape) if shape else draw(1)[0]


def normalised(scores: list[float]) -> tuple[list[float], float]:
    top = max(scores)
    log_z = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - log_z for score in scores], log_z


def apo_policy(seed: int, prompts: int, answers: int, alpha: float) -> Case:
    draw = Draw(seed)
    new, previous = ([normalised(row)[0] for row in draw(prompts, answers)] for _ in range(2))
    rows = [
        normalised([a + alpha * (a - b) for a, b in zip(*both, strict=True)])
        for both in zip(new, previous, strict=True)
    ]
    outputs = {"log_next": [row for row, _ in rows], "log_partition": [log_z for _, log_z in rows]}
    inputs = {"log_hat_new": new, "log_hat_prev": previous}
    return {"hyperparameters": {"kind": "policy", "alpha": alpha}, "inputs": inputs, "outputs": outputs}


def apo_tabular(seed: int, prompts: int, answers: int, alpha: float, betas: list[float]) -> Case:
    draw = Draw(seed)
    reference = [normalised(row)[0] for row in draw(prompts, answers)]
    rewards = [draw(prompts, answers) for _ in betas]

    def trained(start: Any, index: int) -> Any:
        return [
            normalised([s + r / betas[index] for s, r in zip(*both, strict=True)])[0]
            for both in zip(start, rewards[index], strict=True)
        ]

    def expected(policy: Any) -> float:
        return sum(
            sum(math.exp(p) * r for p, r in zip(*both, strict=True)) for both in zip(policy, rewards[0], strict=True)
        ) / len(policy)

    starts, hats, plain, outputs = [reference], [], reference, {"expected_reward": [], "expected_reward_alpha0": []}
    for index in range(len(betas)):
        hats.append(trained(starts[-1], index))
        plain = trained(plain, index)
        before = hats[-2] if index else reference
        starts.append(
            [
                normalised([a + alpha * (a - b) for a, b in zip(*both, strict=True)])[0]
                for both in zip(hats[-1], before, strict=True)
            ]
        )
        outputs["expected_reward"].append(expected(hats[-1]))
        outputs["expected_reward_alpha0"].append(expected(plain))
    settings = {"kind": "tabular", "alpha": alpha, "betas": betas}
    result: Case = {"log_hats": hats, "log_starts": starts} | outputs
    if len(set(betas)) == 1:
        result["reward_coefficients"] = [
            [sum(alpha**k for k in range(t - i + 1)) for i in range(t + 1)] for t in range(len(betas))
        ]
    return {"hyperparameters": settings, "inputs": {"log_ref": reference, "rewards": rewards}, "outputs": result}


def apo_lora(seed: int, outs: int, ins: int, rank: int, alpha: float, scaling: float) -> Case:
    draw = Draw(seed)
    base, factors = (
        draw(outs, ins),
        {"prev": (draw(rank, ins), draw(outs, rank)), "new": (draw(rank, ins), draw(outs, rank))},
    )

    def product(a: Any, b: Any) -> Any:
        return [[scaling * sum(b[o][r] * a[r][i] for r in range(rank)) for i in range(ins)] for o in range(outs)]

    def moved(new: Any, previous: Any) -> Any:
        return [[n + alpha * (n - p) for n, p in zip(*both, strict=True)] for both in zip(new, previous, strict=True)]

    delta = moved(product(*factors["new"]), product(*factors["prev"]))
    a, b = (moved(factors["new"][k], factors["prev"][k]) for k in (0, 1))
    outputs = {
        "delta_next": delta,
        "weight_next": [[w + d for w, d in zip(*both, strict=True)] for both in zip(base, delta, strict=True)],
        "factorwise_delta": product(a, b),
        "rank_bound": 2 * rank,
    }
    inputs = {"W0": base} | {f"lora_{'AB'[k]}_{name}": pair[k] for name, pair in factors.items() for k in (0, 1)}
    return {
        "hyperparameters": {"kind": "lora", "alpha": alpha, "scaling": scaling},
        "inputs": inputs,
        "outputs": outputs,
    }


def apo_parameters(alpha: float, broken: Any = 0.5) -> Case:
    new, previous = {"w": [[1.0, 2.0, broken]], "b": 3.0}, {"w": [[0.0, 1.0, 1.0]], "b": 5.0}
    moved = None if broken != 0.5 else 0.5 + alpha * -0.5
    outputs = {"next_start": {"w": [[1.0 + alpha, 2.0 + alpha, moved]], "b": 3.0 - 2 * alpha}}
    inputs = {"hat_new": new, "hat_prev": previous}
    return {"hyperparameters": {"kind": "parameters", "alpha": alpha}, "inputs": inputs, "outputs": outputs}


CASES = [
    apo_sequence(1, 6, 0.7, (5,)),
    apo_sequence(2, 2, 0.3, ()),  # theta is a number
    apo_sequence(3, 3, 0.0, (2,)),  # no anchor makes a difference
    apo_sequence(4, 3, 0.5, (2,), still=True),
    apo_sequence(5, 1, 0.5, (1,)),
    apo_policy(6, 5, 3, 1.3),
    apo_tabular(7, 3, 6, 0.6, [0.3] * 5),
    apo_tabular(8, 1, 2, -0.2, [2.0, 1.0]),
    apo_lora(9, 7, 5, 3, 0.9, 0.5),
    apo_lora(10, 4, 4, 1, 0.0, 1.0),
    apo_parameters(0.25),
    apo_parameters(0.25, broken=None),
    apo_parameters(0.25, broken="inf"),
]


@pytest.mark.parametrize("case", CASES)
def test_other_sizes(case: Case) -> None:
    adapter("apo")(case)


@pytest.mark.parametrize(
    ("number", "output"),
    [(0, "starts_with_wrong_anchor"), (1, "released"), (6, "expected_reward_alpha0"), (8, "factorwise_delta")],
)
def test_a_wrong_number_is_noticed(number: int, output: str) -> None:
    check_notices("apo", CASES[number], output)
