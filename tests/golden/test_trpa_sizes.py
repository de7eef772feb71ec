"""The adapter of TRPA on cases of other sizes and settings, whose numbers come from plain loops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.golden.generated import Case, Draw, adapter, check_notices, gradients, leaves, nothing


def trpa_case(
    seed: int, groups: list[int], levels: list[int], width: int, empty: tuple[int, ...] = (), **settings: Any
) -> Case:
    """The official numbers: NaN as soon as a row without a token takes part."""
    draw, rows = Draw(seed), len(groups)
    reference, old = draw(rows, width), draw(rows, width)
    new = [
        [value + d for value, d in zip(*both, strict=True)]
        for both in zip(old, draw(rows, width, scale=0.3), strict=True)
    ]
    mask = draw.mask(rows, width)
    for row in range(rows):
        mask[row] = [0] * width if row in empty else [1, *mask[row][1:]]
    leaf = leaves(new)
    rho = [
        sum(((leaf[i][t] - reference[i][t]) for t in range(width) if mask[i][t]), nothing()) / max(sum(mask[i]), 1)
        for i in range(rows)
    ]
    pairs = [
        [i, j, settings["beta"] * (settings["anisotropy"] if levels[i] == 1 else 1.0)]
        for i, j in itertools.product(range(rows), repeat=2)
        if groups[i] == groups[j] and levels[i] < levels[j]
    ]
    if pairs:
        losses = [torch.log1p(torch.exp(-c * (rho[i] - rho[j]))) for i, j, c in pairs]
        spoilt = any(i in empty or j in empty for i, j, _ in pairs)
    else:
        losses = [torch.log1p(torch.exp((-1 if levels[i] == 1 else 1) * rho[i])) for i in range(rows)]
        spoilt = bool(empty)
    preference = sum(losses) / len(losses)
    tokens, kl = sum(map(sum, mask)), nothing()
    for i, t in itertools.product(range(rows), range(width)):
        if mask[i][t]:
            d = old[i][t] - leaf[i][t]
            kl = kl + (torch.exp(d) - d - 1).clamp(-10, 10)
    kl = kl / tokens
    total = preference + settings["tr_kl_coef"] * (torch.sqrt(kl + 0.25) if settings["use_sqrt_trkl"] else kl)
    outputs: Case = {
        "seq_log_ratio": [None if i in empty else value.item() for i, value in enumerate(rho)],
        "num_pairs": len(pairs),
        "pairs": pairs,
        "fallback": not pairs,
        "tr_kl": kl.item(),
    }
    for name, value in (("preference", preference), ("total", total)):
        for cell in itertools.chain(*leaf):
            cell.grad = None
        value.backward(retain_graph=True)
        outputs[f"{name}_loss"] = None if spoilt else value.item()
        outputs[f"grad_{name}"] = [[None] * width for _ in range(rows)] if spoilt else gradients(leaf)
    inputs = {"log_prob": new, "ref_log_prob": reference, "old_log_prob": old, "mask": mask}
    inputs |= {"preference_levels": levels, "group_id": groups}
    return {"hyperparameters": settings | {"kl_type": "low_var_kl"}, "inputs": inputs, "outputs": outputs}


CHOSEN = {"beta": 0.7, "anisotropy": 1.5, "tr_kl_coef": 0.3, "use_sqrt_trkl": False}
ROOT = CHOSEN | {"use_sqrt_trkl": True}
CASES = [
    trpa_case(1, [4, 4, 9, 9, 9, 9, 4, 9, 4, 4, 4], [1, 3, 2, 2, 5, 1, 1, 9, 2, 4, 3], 3, **CHOSEN),
    trpa_case(2, [0], [1], 12, **ROOT),
    trpa_case(3, [0, 0], [2, 6], 1, **ROOT),
    trpa_case(4, [1, 1, 1, 2], [1, 2, 2, 1], 5, empty=(3,), **CHOSEN),  # an empty row that is in no pair
    trpa_case(5, [1, 1, 1, 2], [1, 2, 2, 1], 5, empty=(0,), **CHOSEN),  # all pairs hold it
    trpa_case(6, [1, 1, 1, 1], [1, 2, 2, 1], 5, empty=(0, 2), **ROOT),
    trpa_case(7, [1, 2, 3], [2, 1, 2], 4, empty=(1,), **CHOSEN),  # the fallback
]


@pytest.mark.parametrize("case", CASES)
def test_other_sizes(case: Case) -> None:
    adapter("trpa")(case)


@pytest.mark.parametrize(("number", "output"), [(0, "total_loss"), (0, "grad_preference"), (4, "tr_kl")])
def test_a_wrong_number_is_noticed(number: int, output: str) -> None:
    check_notices("trpa", CASES[number], output)
