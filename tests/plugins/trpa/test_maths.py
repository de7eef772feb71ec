"""TRPA: its mathematics against loops and against DPO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks import Loss
from trl_ext_hooks.toolkit.losses import sequence_log_ratio
from trl_ext_plugins.trpa import (
    TRPA,
    pair_factors,
    preference_losses,
    preference_pairs,
    rule_levels,
    trust_region,
)

NAN = math.nan
LN2 = math.log(2)
SEEDS = st.integers(0, 10_000)
LEVELS = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, NAN]), min_size=1, max_size=9)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def exact_advantages(
    rho: list[float], levels: list[float], groups: list[int], beta: float = 0.1, anisotropy: float = 2.5
) -> list[float]:
    """A_i = -N * dL_pref / d rho_i by the formula: what a stock loss needs to have the same gradient."""
    n = len(rho)
    total, count = [0.0] * n, 0
    for i in range(n):
        for j in range(n):
            if groups[i] == groups[j] and levels[i] < levels[j]:
                c = beta * anisotropy if levels[i] == 1 else beta
                weight = c * sigmoid(-c * (rho[i] - rho[j]))
                total[i] += weight
                total[j] -= weight
                count += 1
    return [n * value / max(count, 1) for value in total]


def preference(rho: torch.Tensor, levels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    pairs = preference_pairs(levels, groups)
    return preference_losses(rho, pairs, pair_factors(levels, pairs, 0.1, 2.5)).mean()


@settings(max_examples=60, deadline=None)
@given(LEVELS, SEEDS)
def test_pairs_and_gradient_are_those_of_the_formula(levels: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 3, (len(levels),), generator=generator)
    values = torch.tensor(levels, dtype=torch.float64)
    pairs = preference_pairs(values, groups)
    expected = {
        (i, j)
        for i in range(len(levels))
        for j in range(len(levels))
        if groups[i] == groups[j] and levels[i] < levels[j]
    }
    assert {tuple(pair) for pair in pairs.tolist()} == expected and len(pairs) == len(expected)
    rho = torch.randn(len(levels), generator=generator, dtype=torch.float64).requires_grad_()
    if not expected:
        return
    (gradient,) = torch.autograd.grad(preference(rho, values, groups), rho)
    advantages = exact_advantages(rho.tolist(), levels, groups.tolist())
    assert gradient.tolist() == pytest.approx([-value / len(levels) for value in advantages], abs=1e-12)
    for group in groups.unique():
        assert sum(a for a, g in zip(advantages, groups, strict=True) if g == group) == pytest.approx(0, abs=1e-12)
        mine = [k for k in range(len(levels)) if groups[k] == group and not math.isnan(levels[k])]
        for k in mine:  # a best row is never pushed down, a worst row never up
            assert levels[k] > min(levels[m] for m in mine) or advantages[k] >= 0
            assert levels[k] < max(levels[m] for m in mine) or advantages[k] <= 0


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.lists(st.integers(2, 50), min_size=3, max_size=3, unique=True))
def test_only_the_order_of_levels_matters(seed: int, others: list[int]) -> None:
    """Any relabelling that keeps the order and level 1, and any order of rows."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(1, 5, (8,), generator=generator).double()
    groups = torch.arange(8) // 4
    rho = torch.randn(8, generator=generator, dtype=torch.float64)
    plain = preference(rho, levels, groups)
    names = torch.tensor([0.0, 1.0, *sorted(others)], dtype=torch.float64)
    torch.testing.assert_close(preference(rho, names[levels.long()], groups), plain, equal_nan=True)
    order = torch.randperm(8, generator=generator)
    torch.testing.assert_close(preference(rho[order], levels[order], groups[order]), plain, equal_nan=True)


def test_two_rows_of_one_token_are_dpo() -> None:
    policy, reference = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-1.5], [-1.2]])
    rho = sequence_log_ratio(policy, reference, torch.ones(2, 1))
    pairs = torch.tensor([[0, 1]])
    found = preference_losses(rho, pairs, torch.tensor([0.1]))
    margin = (policy - reference)[0, 0] - (policy - reference)[1, 0]
    torch.testing.assert_close(found[0], -torch.nn.functional.logsigmoid(0.1 * margin))


def test_an_anisotropy_of_0_leaves_out_the_pairs_that_level_1_wins() -> None:
    """The authors' script takes it."""
    assert TRPA.Options(anisotropy=0.0).anisotropy == 0
    levels, groups = torch.tensor([1.0, 2, 3]), torch.zeros(3, dtype=torch.long)
    rho = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    pairs = preference_pairs(levels, groups)
    preference_losses(rho, pairs, pair_factors(levels, pairs, 0.1, 0.0)).sum().backward()
    gradient = 0.1 * torch.sigmoid(torch.tensor(-0.1 * (-0.2 - 0.5))).item()
    assert rho.grad is not None and rho.grad.tolist() == pytest.approx([0.0, -gradient, gradient])


def test_at_the_reference_every_pair_is_ln_2() -> None:
    levels, groups = torch.tensor([1.0, 1, 2, 4, 3]).double(), torch.zeros(5, dtype=torch.long)
    rho = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = preference(rho, levels, groups)
    assert loss.item() == pytest.approx(LN2)
    (gradient,) = torch.autograd.grad(loss, rho)
    # (wins - losses, weighted by c) / 2 / 9 pairs: rows on level 1 win 3 times with c = 0.25, the others with 0.1
    net = [3 * 0.25, 3 * 0.25, 2 * 0.1 - 2 * 0.25, -2 * 0.25 - 2 * 0.1, 0.1 - 2 * 0.25 - 0.1]
    assert gradient.tolist() == pytest.approx([-value / 18 for value in net])


def test_longer_completions_of_equal_ratios_weigh_the_same_per_token_and_more_in_a_sum() -> None:
    generator = torch.Generator().manual_seed(2)
    logps, reference = torch.randn(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    twice = [value.repeat(1, 2) for value in (logps, reference, mask)]
    torch.testing.assert_close(sequence_log_ratio(*twice), sequence_log_ratio(logps, reference, mask))
    torch.testing.assert_close(sequence_log_ratio(*twice, "sum"), 2 * sequence_log_ratio(logps, reference, mask, "sum"))


def test_the_trust_region_is_exactly_0_on_policy_and_clamped() -> None:
    logps = torch.randn(3, 4, requires_grad=True)
    kl = trust_region(logps, logps.detach(), torch.ones(3, 4))
    assert kl == 0 and (torch.autograd.grad(kl, logps)[0] == 0).all()
    far = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    kl = trust_region(far, torch.tensor([[4.0, 0.5, 4.0]]), torch.tensor([[1, 1, 0]]))
    assert kl.item() == pytest.approx(10 + math.exp(0.5) - 1.5)
    assert torch.autograd.grad(kl, far)[0].tolist() == [[0.0, pytest.approx(1 - math.exp(0.5)), 0.0]]


def test_a_very_negative_margin_stays_finite() -> None:
    rho = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    loss = preference_losses(rho, torch.tensor([[0, 1]]), torch.tensor([0.25])).sum()
    assert loss.item() == pytest.approx(1000.0)
    assert torch.autograd.grad(loss, rho)[0].tolist() == [-0.25, 0.25]


def test_levels_by_rules() -> None:
    """The authors' four levels, of a format, a readable and a right answer."""
    rewards = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, NAN, 0], [NAN, 0, 0]])
    names = ("format", "readable", "right")
    rules = [{"format": 1, "right": 1}, {"format": 1, "readable": 1}, {"format": 0.5}]
    found = rule_levels(rewards, names, rules)
    torch.testing.assert_close(found, torch.tensor([1, 2, 3, 4, 4, NAN, NAN]), equal_nan=True)
    assert rule_levels(rewards[:, :1], names[:1], [{"format": 1}])[:5].tolist() == [1, 1, 1, 2, 2]


def gradient(loss: Loss, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    value = TRPA(TRPA.Options(**options)).policy_loss(loss=loss).values
    return value.detach(), torch.autograd.grad(value, loss.per_token_logps)[0]
