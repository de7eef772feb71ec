"""Reg-GRPO: the loss of a micro-batch, rows that are left out, and what is refused or said before training."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext_hooks import Loss
from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.reg_grpo import RegGRPO


def micro_batch(advantages: list[float], drift: float = 0.3, beta: float = 0.0, **batch: Any) -> Loss:
    """Groups of four rows of three tokens, whose reference is 0.1 nats a token below the sampling policy."""
    generator = torch.Generator().manual_seed(4)
    old = -torch.rand((len(advantages), 3), generator=generator, dtype=torch.float64)
    logps = (old + drift * torch.randn(old.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    rows = len(advantages)
    fields = {
        "completion_mask": torch.ones(old.shape, dtype=torch.long),
        "old_per_token_logps": old,
        "ref_per_token_logps": old - 0.1,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "trl_ext_group_ids": torch.arange(rows) // 4,
        "reg_grpo_rows": torch.ones(rows, dtype=torch.bool),
        "reg_grpo_groups": torch.tensor(rows / 4),
        "reg_grpo_tokens": torch.tensor(3.0 * rows),
    }
    trainer: Any = types.SimpleNamespace(kind="grpo", args=types.SimpleNamespace(beta=beta))
    return Loss("train", 0, trainer, fields | batch, logps, None)


def gradient(loss: Loss, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    value = RegGRPO(RegGRPO.Options(**options)).policy_loss(loss=loss).values
    return value.detach(), torch.autograd.grad(value, loss.per_token_logps)[0]


ADVANTAGES = [1.2, -0.4, -0.4, -0.4, 0.5, 0.5, -1.0, 0.0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_loss_is_the_squared_error(reduction: str) -> None:
    loss = micro_batch(ADVANTAGES)
    tokens = loss.per_token_logps.detach() - loss.old_per_token_logps
    rho = tokens.sum(1) if reduction == "sum" else tokens.mean(1)
    errors = (torch.tensor(ADVANTAGES) - group_normalize(rho, loss.group_ids)) ** 2
    torch.testing.assert_close(gradient(loss, reduction=reduction)[0], errors.mean())


def test_a_row_that_is_left_out_is_in_no_statistic() -> None:
    """As if the other rows of its group had been sampled alone."""
    rows = torch.tensor([True, False, *[True] * 6])
    value, found = gradient(micro_batch(ADVANTAGES, reg_grpo_rows=rows))
    assert (found[1] == 0).all() and (found[rows].abs().sum(1) > 0).all()
    loss = micro_batch(ADVANTAGES)
    fewer = {name: field[rows] if field.dim() else field for name, field in loss.batch.items()}
    alone = Loss("train", 0, loss.trainer, fewer, loss.per_token_logps.detach()[rows].requires_grad_(), None)
    torch.testing.assert_close((value, found[rows]), gradient(alone))
    nobody, nothing = gradient(micro_batch(ADVANTAGES, reg_grpo_rows=torch.zeros(8, dtype=torch.bool)))
    assert nobody == 0 and (nothing == 0).all()


def test_tokens_that_do_not_count_have_no_gradient() -> None:
    tools = torch.tensor([[1, 0, 1]] * 8)
    value, found = gradient(micro_batch(ADVANTAGES, tool_mask=tools))
    assert (found[:, 1] == 0).all() and (found[:, 0] != 0).all()
    torch.testing.assert_close((value, found), gradient(micro_batch(ADVANTAGES, completion_mask=tools)))


@pytest.mark.parametrize("corrected", [False, True])
def test_beta_adds_the_kl_of_trl(corrected: bool) -> None:
    plain, loss = gradient(micro_batch(ADVANTAGES)), micro_batch(ADVANTAGES, beta=0.25)
    loss.trainer.args.use_bias_correction_kl = corrected
    with_kl = gradient(loss)
    drift = loss.batch["ref_per_token_logps"] - loss.per_token_logps
    ratio = (loss.per_token_logps - loss.old_per_token_logps).exp() if corrected else 1.0
    kl = 0.25 * ((drift.exp() - drift - 1) * ratio).mean()
    torch.testing.assert_close(with_kl[0], plain[0] + kl.detach())
    torch.testing.assert_close(with_kl[1], plain[1] + torch.autograd.grad(kl, loss.per_token_logps)[0])


def test_the_ratio_to_another_sampler_weighs_the_gradient() -> None:
    ratio = torch.linspace(0, 2, 24, dtype=torch.float64).view(8, 3)
    value, found = gradient(micro_batch(ADVANTAGES))
    same, weighed = gradient(micro_batch(ADVANTAGES, importance_sampling_ratio=ratio))
    torch.testing.assert_close((same, weighed), (value, found * ratio))


def test_what_is_refused_and_said_before_training(build: Any) -> None:
    with refused(
        trl_ext.ConfigError, "'spae' makes an advantage per token, and the loss of 'reg-grpo' uses one per row"
    ):
        trl_ext.enable("reg-grpo", "spae")
    with trl_ext.enable("reg-grpo"):
        said = "with one update per rollout all log-ratios are 0"
        assert any(said in note for note in build(beta=0.0)._trl_ext.plan.notes)
        for reused in ({"num_iterations": 2}, {"steps_per_generation": 2}):
            assert not any(said in note for note in build(beta=0.0, **reused)._trl_ext.plan.notes)
        with refused(trl_ext.ConfigError, "reg-grpo replaces the policy loss and does not apply epsilon=0.3"):
            build(beta=0.0, epsilon=0.3)
