"""The mathematics of DeGRPO: weights against two means in plain loops, control tokens and modes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.losses import clipped_surrogate, masked_mean
from trl_ext_plugins.thinkless.maths import (
    control_tokens,
    read_mode,
    sequence_mean_weights,
    token_mean_weights,
)

SEEDS = st.integers(0, 10_000)


def batch(seed: int, lengths: tuple[int, ...] = (5, 1, 3, 0, 2), drift: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    old = -torch.rand(shape, generator=generator, dtype=torch.float64)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths).unsqueeze(1)).long()
    return {
        "old": old,
        "logps": (old + drift * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_(),
        "advantages": torch.randn(shape[0], 1, generator=generator, dtype=torch.float64),
        "mask": mask,
        "control": control_tokens(torch.zeros_like(mask), mask),
    }


def token_mean(data: dict[str, torch.Tensor], alpha: float | None) -> torch.Tensor:
    """The trainer's token mean (loss_type dapo) of weighted advantages."""
    weights: Any = 1.0
    if alpha is not None:
        weights = token_mean_weights(data["control"], data["mask"], alpha, data["control"].sum(), data["mask"].sum())
    losses = clipped_surrogate(torch.exp(data["logps"] - data["old"]), data["advantages"] * weights, 0.2, 0.2)
    return masked_mean(losses, data["mask"])


def sequence_mean(data: dict[str, torch.Tensor], alpha: float) -> torch.Tensor:
    """The trainer's mean over rows of means over tokens (loss_type grpo)."""
    weights = sequence_mean_weights(data["control"], data["mask"], alpha)
    losses = clipped_surrogate(torch.exp(data["logps"] - data["old"]), data["advantages"] * weights, 0.2, 0.2)
    return masked_mean(losses, data["mask"], dim=1).mean()


def gradient(loss: torch.Tensor, data: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.autograd.grad(loss, data["logps"])[0]


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.floats(0, 2), st.floats(0, 1))
def test_weighted_advantages_are_the_two_means(seed: int, alpha: float, drift: float) -> None:
    """Both aggregations, off-policy with clipping, on ragged rows with an empty one, against plain loops."""
    data = batch(seed, drift=drift)
    losses = clipped_surrogate(torch.exp(data["logps"] - data["old"]), data["advantages"], 0.2, 0.2).tolist()
    lengths = data["mask"].sum(1).tolist()
    control = [losses[i][0] for i, n in enumerate(lengths) if n]
    response = [losses[i][t] for i, n in enumerate(lengths) for t in range(1, n)]
    expected = alpha * sum(control) / len(control) + sum(response) / len(response)
    assert token_mean(data, alpha).item() == pytest.approx(expected, abs=1e-9)
    rows = 0.0
    for i, n in enumerate(lengths):
        if n:
            rows += alpha * losses[i][0] + (sum(losses[i][1:n]) / (n - 1) if n > 1 else 0.0)
    assert sequence_mean(data, alpha).item() == pytest.approx(rows / len(lengths), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_neutral_alpha_is_the_plain_token_mean(seed: int) -> None:
    data = batch(seed)
    total, on = data["mask"].sum().item(), data["control"].sum().item()
    neutral = token_mean(data, on / (total - on))
    torch.testing.assert_close(neutral, token_mean(data, None) * total / (total - on))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0, 3))
def test_weights_of_control_tokens_add_up_to_alpha_and_of_the_others_to_1(seed: int, alpha: float) -> None:
    data = batch(seed)
    total, control = data["mask"].sum(), data["control"]
    weights = token_mean_weights(control, data["mask"], alpha, control.sum(), total)
    assert (weights[control].sum() / total).item() == pytest.approx(alpha)
    assert (weights[~control].sum() / total).item() == pytest.approx(1)
    assert (weights[data["mask"] == 0] == 0).all()


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.1, 3))
def test_alpha_scales_the_gradient_of_control_tokens_and_no_other(seed: int, alpha: float) -> None:
    data = batch(seed)
    for form in (token_mean, sequence_mean):
        one, other = gradient(form(data, 1.0), data), gradient(form(data, alpha), data)
        torch.testing.assert_close(other[data["control"]], alpha * one[data["control"]])
        torch.testing.assert_close(other[~data["control"]], one[~data["control"]])


def test_the_gradient_of_the_control_token_does_not_depend_on_lengths() -> None:
    """Unlike in GRPO; in the sequence form it does not depend on the row's own length either."""
    short, long = batch(0, (3, 2, 4)), batch(0, (3, 2, 4))
    repeat = [0, 1, 1, 2, 2, 3, 3]
    for name in ("old", "logps", "mask", "control"):
        long[name] = long[name].detach()[:, repeat]
    long["logps"].requires_grad_()
    (plain, plain_long), (ours, ours_long), (rows, rows_long) = (
        [gradient(form(data, alpha), data)[:, 0] for data in (short, long)]
        for form, alpha in ((token_mean, None), (token_mean, 0.3), (sequence_mean, 0.3))
    )
    torch.testing.assert_close(ours, ours_long)
    torch.testing.assert_close(rows, rows_long)
    assert (plain - plain_long).abs().max() > 0.01
    on_policy = batch(0, (3, 2, 4), drift=0.0)
    found = gradient(sequence_mean(on_policy, 0.3), on_policy)[:, 0]
    torch.testing.assert_close(found, -0.3 * on_policy["advantages"][:, 0] / 3)


def test_on_policy_the_gradient_is_the_weighted_advantage() -> None:
    data = batch(4, drift=0.0)
    weights = token_mean_weights(data["control"], data["mask"], 0.4, data["control"].sum(), data["mask"].sum())
    expected = -data["advantages"] * weights / data["mask"].sum()
    torch.testing.assert_close(gradient(token_mean(data, 0.4), data), expected)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (0, 0), (0, 1)])
def test_means_over_nothing_are_0(lengths: tuple[int, ...]) -> None:
    data = batch(0, (*lengths, 2))
    data = {name: value[: len(lengths)] for name, value in data.items()}
    data["logps"] = data["logps"].detach().requires_grad_()
    for form in (token_mean, sequence_mean):
        loss = form(data, 0.5)
        assert math.isfinite(loss.item()) and torch.isfinite(gradient(loss, data)).all()


def test_what_counts_as_control_token() -> None:
    ids = torch.tensor([[7, 1, 2, 7, 1], [1, 7, 2, 8, 1], [8, 2, 3, 0, 0], [8, 1, 1, 1, 1]])
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    tools = torch.tensor([[1, 1, 0, 1, 1]] * 2 + [[1, 1, 1, 1, 1]] * 2)
    first = [[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask).int().tolist() == first
    known = [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask, (7, 8)).int().tolist() == known
    every = [[1, 0, 0, 1, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask, None, tools).int().tolist() == every
    both = [[1, 0, 0, 1, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert control_tokens(ids, mask, (7, 8), tools).int().tolist() == both


def test_the_mode_is_the_first_token_and_the_answer_follows() -> None:
    ids = {"think": 7, "short": 8, "close": 9}
    completions = [[8, 1, 9, 2], [7, 8, 9, 1, 9], [7, 1], [9, 1], [8], [7, 9], []]
    expected = [("short", 1), ("think", 3), ("think", None), (None, None), ("short", 1), ("think", 2), (None, None)]
    assert [read_mode(completion, ids) for completion in completions] == expected


def test_advantages_of_the_cases_that_matter() -> None:
    """Right short answers get 1, wrong ones -1: one right one among G has A = 2 (1 - 1/G), no right one has 0."""
    rewards = torch.tensor([1.0, -1, -1, -1, -1, -1, -1, -1], dtype=torch.float64)
    found = group_normalize(rewards, torch.arange(8) // 4, scale=False)
    assert found[0].item() == pytest.approx(2 * (1 - 1 / 4)) and (found[4:] == 0).all()
