"""P3O: its mathematics against loops, its invariances, and what has a gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks import Loss
from trl_ext_plugins.p3o import (
    P3O,
    joint_clipping,
    reward_gap,
    separate_clipping,
    token_clipping,
)

SEEDS = st.integers(0, 10_000)
CLIP = (0.2, 10.0)


def sides(seed: int, pairs: int = 5, drift: float = 0.4) -> dict[str, Any]:
    """Scores, old scores and rewards of some pairs; the first two carry gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(pairs, generator=generator, dtype=torch.float64)

    old = (draw(), draw())
    scores = tuple((value + draw(drift)).requires_grad_() for value in old)
    return {"scores": scores, "old": old, "rewards": (draw(), draw())}


def pair_loss(
    variant: str, scores: Any, old: Any, rewards: Any, kl: float = 0.05, clip: tuple[float, float] = CLIP
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(mean loss, gradients of both sides)"""
    gap = reward_gap(rewards, scores, kl)
    ratios = (scores[0] - old[0], scores[1] - old[1])
    if variant == "v1":
        values, _ = separate_clipping(ratios, gap, *clip)
    else:
        values, _ = joint_clipping(ratios, old, gap, *clip)
    loss = values.mean()
    return loss.detach(), list(torch.autograd.grad(loss, scores))


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(["v1", "v2"]), st.floats(0.05, 0.5), st.floats(1.0, 5.0))
def test_it_is_the_loop_of_the_equations(seed: int, variant: str, eps: float, c: float) -> None:
    given_ = sides(seed)
    total = 0.0
    for k in range(5):
        s1, s2, o1, o2, r1, r2 = (
            given_[name][side][k].item() for name in ("scores", "old", "rewards") for side in (0, 1)
        )
        q = r1 - r2 - 0.05 * (s1 - s2)

        def cl(x: float) -> float:
            return min(max(x, 1 / c), c)

        w1, w2 = math.exp(s1 - o1), math.exp(s2 - o2)
        if variant == "v1":
            a = (-q * cl(w2) * w1, -q * cl(w2) * min(max(w1, 1 - eps), 1 + eps))
            b = (q * cl(w1) * w2, q * cl(w1) * min(max(w2, 1 - eps), 1 + eps))
            total += (max(a) + max(b)) / 2
        else:
            u, d, d0 = cl(w1 * w2), s1 - s2, o1 - o2
            total += max(-q * u * d, -q * u * min(max(d, d0 - eps), d0 + eps)) / 2
    loss, _ = pair_loss(variant, **given_, clip=(eps, c))
    assert loss.item() == pytest.approx(total / 5, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["v1", "v2"]), st.floats(0.1, 10))
def test_a_constant_per_prompt_does_not_matter_and_a_factor_is_a_factor(seed: int, variant: str, k: float) -> None:
    found = sides(seed)
    loss, gradients = pair_loss(variant, **found)
    shift = 10 * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shifted = found | {"rewards": tuple(reward + shift for reward in found["rewards"])}
    same, alike = pair_loss(variant, **shifted)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(alike, gradients)
    scaled = found | {"rewards": tuple(reward * k for reward in found["rewards"])}
    _, larger = pair_loss(variant, **scaled, kl=0.05 * k)
    torch.testing.assert_close(larger, [gradient * k for gradient in gradients])


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_exchanging_the_completions_exchanges_the_gradients(variant: str) -> None:
    found = sides(1)
    loss, (one, two) = pair_loss(variant, **found)
    exchanged = {name: (second, first) for name, (first, second) in found.items()}
    same, (other, first) = pair_loss(variant, **exchanged)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close((first, other), (one, two))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["v1", "v2"]), st.sampled_from([0.0, 0.2]))
def test_on_policy_it_is_the_pairwise_policy_gradient(seed: int, variant: str, eps: float) -> None:
    """Also with a clip range of 0, where both branches tie and both pass the gradient."""
    found = sides(seed, drift=0.0)
    gap = reward_gap(found["rewards"], found["scores"], 0.05)
    loss, (one, two) = pair_loss(variant, **found, clip=(eps, 10.0))
    torch.testing.assert_close(one, -gap / 10)  # -q / (2 P)
    torch.testing.assert_close(two, gap / 10)
    difference = found["scores"][0].detach() - found["scores"][1].detach()
    expected = torch.zeros(()) if variant == "v1" else -(gap * difference).mean() / 2
    torch.testing.assert_close(loss, expected.double())


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_without_clipping_both_variants_have_one_gradient(seed: int) -> None:
    found = sides(seed, drift=0.1)
    wide = (1e6, 1e6)
    _, one = pair_loss("v1", **found, clip=wide)
    _, two = pair_loss("v2", **found, clip=wide)
    torch.testing.assert_close(one, two)
    ratio = sum(new.detach() - old for new, old in zip(found["scores"], found["old"], strict=True)).exp()
    torch.testing.assert_close(one[0], -reward_gap(found["rewards"], found["scores"], 0.05) * ratio / 10)


def constant(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values)


def test_clipping_stops_the_gradient_on_the_side_that_profits() -> None:
    old, better, worse = constant(0.0, 0.0), constant(1.0, 0.0), constant(0.0, 1.0)
    for drift, rewards, stopped in (
        (0.5, better, True),
        (0.5, worse, False),
        (-0.5, worse, True),
        (-0.5, better, False),
    ):
        _, gradients = pair_loss("v2", constant(drift, 0.0), old, rewards, kl=0.0)
        assert (gradients[0] == 0).item() == (gradients[1] == 0).item() == stopped
        _, (own, _) = pair_loss("v1", constant(drift, 0.0), old, rewards, kl=0.0)
        assert (own == 0).item() == stopped


def test_what_is_detached_has_no_gradient() -> None:
    """At w = 1 and inside the clip range the loss is linear in the scores, so a gradient through q or cl would show."""
    found = sides(3, drift=0.05)
    for variant in ("v1", "v2"):
        _, free = pair_loss(variant, **found, kl=0.3, clip=(10.0, 1.0))  # c = 1: importance weights are constant
        gap = reward_gap(found["rewards"], found["scores"], 0.3)
        ratios = [(new - old).detach().exp() for new, old in zip(found["scores"], found["old"], strict=True)]
        own = ratios if variant == "v1" else [torch.ones(5)] * 2
        torch.testing.assert_close(free, [-gap * own[0] / 10, gap * own[1] / 10])
    assert not reward_gap(found["rewards"], found["scores"], 0.3).requires_grad


def test_a_ratio_that_explodes_against_the_reward() -> None:
    """V1 keeps the unclipped ratio, as the authors' code does; V2 is bounded."""
    old, rewards = constant(0.0, 0.0), constant(0.0, 1.0)
    loss, _ = pair_loss("v1", constant(9.0, 0.0), old, rewards, kl=0.0)
    assert loss.item() == pytest.approx((math.exp(9.0) - 10.0) / 2)
    loss, _ = pair_loss("v2", constant(9.0, 0.0), old, rewards, kl=0.0)
    assert loss.item() == pytest.approx(10 * 9.0 / 2)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_token_wise_form_is_its_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 4)
    old = tuple(-torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    new = tuple(value + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for value in old)
    masks = (torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0]] * 3))
    gap = torch.randn(3, generator=generator, dtype=torch.float64)
    values, clipped = token_clipping(new, old, masks, gap, *CLIP)
    for p in range(3):
        drift = sum(((new[s][p] - old[s][p]) * masks[s][p]).sum().item() for s in (0, 1))
        u, total, count = min(max(math.exp(drift), 0.1), 10.0), 0.0, 0
        for side, t in itertools.product((0, 1), range(4)):
            if masks[side][p, t]:
                factor = (-1 if side == 0 else 1) * gap[p].item() * u
                lp, before = new[side][p, t].item(), old[side][p, t].item()
                bound = min(max(lp, before - 0.2), before + 0.2)
                total += max(factor * lp, factor * bound)
                count += factor * bound > factor * lp
        assert values[p].item() == pytest.approx(total, abs=1e-9) and clipped[p].item() == count


def gradient(loss: Loss, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    plugin = P3O(P3O.Options(**options))
    value = plugin.policy_loss(loss=loss).values
    return value.detach(), torch.autograd.grad(value, loss.per_token_logps)[0]
