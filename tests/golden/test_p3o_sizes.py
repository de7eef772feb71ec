"""The adapter of P3O on cases of other sizes and settings, whose numbers come from plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.golden.generated import Case, Draw, adapter, check_notices, gradients, leaves, nothing


def p3o_pair(s: Any, o: Any, r: Any, settings: Case) -> tuple[torch.Tensor, float, list[float]]:
    """Loss, q and importance weights of one pair."""
    eps, c = settings["cliprange"], settings["cliprange_ratio"]
    q = (r[0] - r[1] - settings["kl_coef"] * (s[0] - s[1])).detach()
    w = [torch.exp(s[k] - o[k]) for k in (0, 1)]

    def cl(x: torch.Tensor) -> torch.Tensor:
        return x.detach().clamp(1 / c, c)

    if settings["variant"] == "v1":
        first, second = -q * cl(w[1]), q * cl(w[0])
        loss = torch.maximum(first * w[0], first * w[0].clamp(1 - eps, 1 + eps))
        loss = (loss + torch.maximum(second * w[1], second * w[1].clamp(1 - eps, 1 + eps))) / 2
        return loss, q, [cl(w[0]).item(), cl(w[1]).item()]
    u, d, d0 = cl(w[0] * w[1]), s[0] - s[1], o[0] - o[1]
    return torch.maximum(-q * u * d, -q * u * d.clamp(d0 - eps, d0 + eps)) / 2, q, [u.item()]


def p3o_pairs(seed: int, count: int, **settings: Any) -> Case:
    draw = Draw(seed)
    old, rewards = draw(2, count), draw(2, count)
    scores = [
        [value + drift for value, drift in zip(*both, strict=True)]
        for both in zip(old, draw(2, count, scale=0.5), strict=True)
    ]
    leaf, losses, gaps, weights = leaves(scores), [nothing()], [], []
    for k in range(count):
        pick = [[rows[side][k] for side in (0, 1)] for rows in (leaf, old, rewards)]
        loss, q, importance = p3o_pair(*pick, settings)
        losses.append(loss)
        gaps.append(float(q))
        weights.append(importance)
    loss = sum(losses) / count
    loss.backward()
    by_side = [list(column) for column in zip(*weights, strict=True)]
    outputs = {"loss": loss.item(), "q": gaps, "importance": by_side if settings["variant"] == "v1" else by_side[0]}
    outputs |= {f"grad_logratio_{side + 1}": gradients(leaf[side]) for side in (0, 1)}
    inputs = {f"{name}_{side + 1}": rows[side] for side in (0, 1) for name, rows in (("logratio", scores),)}
    inputs |= {f"old_logratio_{side + 1}": old[side] for side in (0, 1)}
    inputs |= {f"reward_{side + 1}": rewards[side] for side in (0, 1)}
    return {"hyperparameters": settings, "inputs": inputs, "outputs": outputs}


def p3o_groups(seed: int, prompts: int, group: int, **settings: Any) -> Case:
    draw = Draw(seed)
    old, rewards, scores = draw(prompts, group), draw(prompts, group), draw(prompts, group)
    leaf, losses = leaves(scores), []
    for b in range(prompts):
        for i, j in itertools.combinations(range(group), 2):
            losses.append(p3o_pair(*[[rows[b][i], rows[b][j]] for rows in (leaf, old, rewards)], settings)[0])
    loss = sum(losses) / len(losses) if losses else nothing()
    loss.backward()
    outputs = {"loss": loss.item() if losses else None, "grad_logratio": gradients(leaf), "num_pairs": len(losses)}
    inputs = {"logratio": scores, "old_logratio": old, "rewards": rewards}
    return {"hyperparameters": settings | {"pairing": "all"}, "inputs": inputs, "outputs": outputs}


def p3o_tokens(seed: int, count: int, width: int, **settings: Any) -> Case:
    draw = Draw(seed)
    old, reference, masks, rewards = draw(2, count, width), draw(2, count, width), [], draw(2, count)
    new = [
        [[v + d for v, d in zip(*r, strict=True)] for r in zip(*s, strict=True)]
        for s in zip(old, draw(2, count, width), strict=True)
    ]
    masks = [draw.mask(count, width) for _ in (0, 1)]
    masks[0][0][0] = 1
    leaf, total, tokens = leaves(new), nothing(), 0
    eps, c = settings["cliprange"], settings["cliprange_ratio"]
    for k in range(count):
        sums = [[0.0, 0.0], [0.0, 0.0]]  # per side: against the reference, against the sampling policy
        for side, t in itertools.product((0, 1), range(width)):
            sums[side][0] += (new[side][k][t] - reference[side][k][t]) * masks[side][k][t]
            sums[side][1] += (new[side][k][t] - old[side][k][t]) * masks[side][k][t]
        q = rewards[0][k] - rewards[1][k] - settings["kl_coef"] * (sums[0][0] - sums[1][0])
        factor = -q * min(max(math.exp(sums[0][1] + sums[1][1]), 1 / c), c)
        for side, t in itertools.product((0, 1), range(width)):
            if masks[side][k][t]:
                signed, value, before = factor * (1 if side == 0 else -1), leaf[side][k][t], old[side][k][t]
                total = total + torch.maximum(signed * value, signed * value.clamp(before - eps, before + eps))
                tokens += 1
    loss = total / tokens
    loss.backward()
    inputs: Case = {}
    for side in (0, 1):
        inputs |= {f"logprobs_{side + 1}": new[side], f"old_logprobs_{side + 1}": old[side]}
        inputs |= {f"ref_logprobs_{side + 1}": reference[side], f"masks_{side + 1}": masks[side]}
        inputs[f"reward_{side + 1}"] = rewards[side]
    outputs = {"loss": loss.item()} | {f"grad_logprobs_{side + 1}": gradients(leaf[side]) for side in (0, 1)}
    return {"hyperparameters": settings, "inputs": inputs, "outputs": outputs}


def p3o_moments(seed: int, sizes: list[int], limit: float) -> Case:
    draw = Draw(seed)
    batches, seen, stds, scaled = [draw(size, scale=3.0) for size in sizes], [], [], []
    for batch in batches:
        clipped = [min(max(value, -limit), limit) for value in batch]
        seen += clipped
        mean = sum(seen) / len(seen)
        std = math.sqrt(sum((v - mean) ** 2 for v in seen) / (len(seen) - 1)) if len(seen) > 1 else None
        stds.append(std)
        scaled.append([None if std is None else value / std for value in clipped])
    settings = {"scale_reward": "running", "cliprange_reward": limit}
    outputs = {"running_std": stds, "scaled_scores": scaled}
    return {"hyperparameters": settings, "inputs": {"score_batches": batches}, "outputs": outputs}


OTHER = {"kl_coef": 0.3, "cliprange": 0.07, "cliprange_ratio": 1.5}
CASES = [
    p3o_pairs(1, 9, variant="v1", **OTHER),
    p3o_pairs(2, 13, variant="v2", **OTHER),
    p3o_pairs(3, 2, variant="v2", **OTHER | {"kl_coef": 0.0, "cliprange": 0.0}),
    p3o_groups(4, 3, 5, variant="v1", **OTHER),
    p3o_groups(5, 1, 7, variant="v2", **OTHER),
    p3o_groups(6, 4, 1, variant="v2", **OTHER),
    p3o_tokens(7, 5, 9, variant="v2_token", **OTHER),
    p3o_tokens(8, 1, 1, variant="v2_token", **OTHER),
    p3o_moments(9, [1, 7, 2, 12], 2.0),
]


@pytest.mark.parametrize("case", CASES)
def test_other_sizes(case: Case) -> None:
    adapter("p3o")(case)


@pytest.mark.parametrize(
    ("number", "output"), [(0, "grad_logratio_2"), (3, "loss"), (6, "grad_logprobs_1"), (8, "running_std")]
)
def test_a_wrong_number_is_noticed(number: int, output: str) -> None:
    check_notices("p3o", CASES[number], output)
