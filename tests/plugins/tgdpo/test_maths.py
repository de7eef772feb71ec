"""TGDPO: the properties of its factors and margins."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl_ext.testing import tiny_model, tiny_trainer
from trl_ext.trl_internals import seams
from trl_ext_plugins.tgdpo import guidance_factors, guided_margin, implicit_rewards

pytestmark = pytest.mark.skipif(seams.trl_version() < seams.Version("1.15"), reason="needs the fused head of TRL 1.15")


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint that was trained with plain DPO on the same pairs."""
    folder = tmp_path_factory.mktemp("guide")
    trainer = tiny_trainer("dpo", tiny_model(folder / "start"), folder / "run", max_steps=6)
    trainer.train()
    trainer.save_model(str(folder / "guide"))
    return str(folder / "guide")


def tensors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_factors_are_affine_in_alpha_and_turn_with_the_side() -> None:
    rewards = tensors(6, 5)
    one, two = guidance_factors(rewards, 0.3), guidance_factors(rewards, 0.6)
    torch.testing.assert_close(two - 1, 2 * (one - 1))
    up = guidance_factors(rewards + 0.1, 0.3)
    assert (up[:3] > one[:3]).all() and (up[3:] < one[3:]).all()
    assert torch.equal(guidance_factors(rewards, 0.0), torch.ones(6, 5, dtype=torch.float64))


def test_a_shift_of_guide_and_reference_changes_nothing() -> None:
    guide, reference = tensors(4, 3), tensors(4, 3, seed=1)
    shift = tensors(4, 3, seed=2)
    torch.testing.assert_close(
        implicit_rewards(guide + shift, reference + shift, 0.1), implicit_rewards(guide, reference, 0.1)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_gradients_at_the_reference_are_the_factors(alpha: float) -> None:
    """-+ beta * f / (2B), so inside a sequence two gradients differ as their factors do."""
    policy = tensors(4, 5).requires_grad_()
    reference, beta = policy.detach().clone(), 0.1
    factors = guidance_factors(implicit_rewards(tensors(4, 5, seed=1), reference, beta), alpha)
    loss = -torch.nn.functional.logsigmoid(beta * guided_margin(policy, reference, factors)).mean()
    (gradient,) = torch.autograd.grad(loss, policy)
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(gradient, sign * beta * factors / 4)
    torch.testing.assert_close(gradient[0, 0] / gradient[0, 1], factors[0, 0] / factors[0, 1])


def test_swapping_the_sides_is_a_mirror_image_for_dpo_only() -> None:
    policy, reference, guide = (tensors(2, 4, seed=seed) for seed in range(3))
    swapped = [x.flip(0) for x in (policy, reference, guide)]

    def margin(policy: Any, reference: Any, guide: Any, alpha: float) -> torch.Tensor:
        return guided_margin(policy, reference, guidance_factors(implicit_rewards(guide, reference, 0.5), alpha))

    torch.testing.assert_close(margin(policy, reference, guide, 0.0), -margin(*swapped, 0.0))
    assert (margin(policy, reference, guide, 1.0) + margin(*swapped, 1.0)).abs() > 1e-2


def test_an_identical_pair_has_a_margin() -> None:
    """2 * alpha * beta^2 * sum(guide's log-ratio * policy's log-ratio), where DPO has 0."""
    policy, reference, guide = (tensors(1, 4, seed=seed).repeat(2, 1) for seed in range(3))
    beta, alpha = 0.1, 0.5
    factors = guidance_factors(implicit_rewards(guide, reference, beta), alpha)
    expected = 2 * alpha * beta**2 * ((guide - reference) * (policy - reference))[0].sum()
    torch.testing.assert_close(beta * guided_margin(policy, reference, factors)[0], expected)


def test_a_least_factor_cuts_what_would_turn_round() -> None:
    rewards = torch.tensor([[-3.0, 1.0], [3.0, -1.0]])
    assert torch.equal(guidance_factors(rewards, 1.0), torch.tensor([[-2.0, 2.0], [-2.0, 2.0]]))
    assert torch.equal(guidance_factors(rewards, 1.0, min_factor=0.2), torch.tensor([[0.2, 2.0], [0.2, 2.0]]))


def test_tokens_outside_and_empty_completions_add_nothing() -> None:
    policy, reference = tensors(4, 3), tensors(4, 3, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    factors = guidance_factors(tensors(4, 3, seed=2), 0.5)
    plain = guided_margin(policy * mask, reference * mask, factors)
    moved = guided_margin(policy * mask, reference * mask, torch.where(mask == 1, factors, 99.0))
    assert torch.equal(plain, moved)
    assert plain[0] == (factors * (policy - reference) * mask)[0].sum()
