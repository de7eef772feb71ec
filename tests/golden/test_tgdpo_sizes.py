"""The adapter of TGDPO on cases of other sizes and settings, whose numbers come from plain loops."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.golden.generated import Case, Draw, adapter, check_notices, gradients, leaves, nothing, numbers


def tgdpo_case(seed: int, count: int, width: int, alpha: float, beta: float, scale: float = 1.0) -> Case:
    draw = Draw(seed)
    logps = {name: draw(2 * count, width, scale=scale) for name in ("policy", "ref", "guide")}
    mask = draw.mask(2 * count, width)
    leaf = leaves(logps["policy"])
    weights = [[1.0] * width for _ in mask]
    sums, plain = [nothing() for _ in mask], [0.0] * len(mask)
    for i, t in itertools.product(range(2 * count), range(width)):
        if mask[i][t]:
            sign = 1 if i < count else -1
            weights[i][t] = 1 + sign * alpha * beta * (logps["guide"][i][t] - logps["ref"][i][t])
            sums[i] = sums[i] + weights[i][t] * (leaf[i][t] - logps["ref"][i][t])
            plain[i] += beta * (logps["policy"][i][t] - logps["ref"][i][t])
        else:  # what lies outside must not matter
            logps["guide"][i][t], logps["ref"][i][t] = None, "-inf"
    margins = [beta * (sums[i] - sums[count + i]) for i in range(count)]
    losses = [torch.nn.functional.softplus(-margin, threshold=700) for margin in margins]
    loss = sum(losses) / count
    loss.backward()
    inputs: Case = {}
    for name, values in (*((f"{name}_%s_logps", rows) for name, rows in logps.items()), ("%s_mask", mask)):
        inputs |= {name % "chosen": values[:count], name % "rejected": values[count:]}
    grads = gradients(leaf)
    outputs = {
        "token_weight_chosen": weights[:count],
        "token_weight_rejected": weights[count:],
        "margin": numbers(margins),
        "losses": numbers(losses),
        "loss": loss.item(),
        "chosen_rewards_sum": plain[:count],
        "rejected_rewards_sum": plain[count:],
        "grad_policy_chosen": grads[:count],
        "grad_policy_rejected": grads[count:],
    }
    return {"hyperparameters": {"alpha": alpha, "beta": beta}, "inputs": inputs, "outputs": outputs}


CASES = [tgdpo_case(1, 5, 9, 1.7, 0.3), tgdpo_case(2, 1, 2, 0.0, 2.0), tgdpo_case(3, 7, 1, 0.4, 0.05, scale=40.0)]


@pytest.mark.parametrize("case", CASES)
def test_other_sizes(case: Case) -> None:
    adapter("tgdpo")(case)


@pytest.mark.parametrize(("number", "output"), [(0, "margin"), (2, "grad_policy_rejected")])
def test_a_wrong_number_is_noticed(number: int, output: str) -> None:
    check_notices("tgdpo", CASES[number], output)
