"""TRPA: the authors' functions, one micro-batch per case."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_plugins.trpa import (
    KL_CLAMP,
    TRPA,
    log_ratio,
    pair_factors,
    preference_losses,
    preference_pairs,
    trust_region,
    unary_losses,
)

LIMIT = 1e-9


def compare(case: dict[str, Any]) -> None:
    settings, outputs = dict(case["hyperparameters"]), case["outputs"]
    assert settings.pop("kl_type") == "low_var_kl" and KL_CLAMP == 10
    assert set(settings) == {"beta", "anisotropy", "tr_kl_coef", "use_sqrt_trkl"}, f"unknown settings {set(settings)}"
    TRPA.Options(**settings)
    inputs = {name: torch.tensor(values, dtype=torch.float64) for name, values in case["inputs"].items()}
    logps, mask, levels = inputs["log_prob"].requires_grad_(), inputs["mask"], inputs["preference_levels"]
    rho = log_ratio(logps, inputs["ref_log_prob"], mask)
    empty = mask.sum(dim=1) == 0
    if empty.any():
        _empty(case, inputs, rho, empty)
        return
    _close(rho.detach(), outputs["seq_log_ratio"], "seq_log_ratio")
    pairs = preference_pairs(levels, inputs["group_id"])
    factors = pair_factors(levels, pairs, settings["beta"], settings["anisotropy"])
    found = sorted([*pair, round(factor, 12)] for pair, factor in zip(pairs.tolist(), factors.tolist(), strict=True))
    assert found == sorted([i, j, round(factor, 12)] for i, j, factor in outputs["pairs"])
    assert len(pairs) == outputs["num_pairs"] and (len(pairs) == 0) == outputs["fallback"]
    preference = (preference_losses(rho, pairs, factors) if len(pairs) else unary_losses(rho, levels)).mean()
    kl = trust_region(logps, inputs["old_log_prob"], mask) / mask.sum()
    penalty = (kl + 0.25).sqrt() if settings["use_sqrt_trkl"] else kl
    total = preference + settings["tr_kl_coef"] * penalty
    for what, value in (("preference_loss", preference), ("tr_kl", kl), ("total_loss", total)):
        _close(value.detach(), outputs[what], what)
    for what, value in (("grad_preference", preference), ("grad_total", total)):
        _close(torch.autograd.grad(value, logps, retain_graph=True)[0], outputs[what], what)


def _empty(case: dict[str, Any], inputs: dict[str, torch.Tensor], rho: torch.Tensor, empty: torch.Tensor) -> None:
    """The official code divides 0 by 0; the plugin drops the row, and the rest is what remains without it."""
    settings, outputs = case["hyperparameters"], case["outputs"]
    assert outputs["preference_loss"] is None and outputs["total_loss"] is None
    for found, expected in zip(rho.tolist(), outputs["seq_log_ratio"], strict=True):
        assert found == 0 if expected is None else abs(found - expected) < LIMIT
    levels = inputs["preference_levels"].masked_fill(empty, torch.nan)
    pairs = preference_pairs(levels, inputs["group_id"])
    kept = [[i, j] for i, j, _ in outputs["pairs"] if not (empty[i] or empty[j])]
    assert sorted(pairs.tolist()) == sorted(kept)
    factors = pair_factors(levels, pairs, settings["beta"], settings["anisotropy"])
    losses = preference_losses(rho, pairs, factors)
    gradient = torch.autograd.grad(losses.mean(), inputs["log_prob"], retain_graph=True)[0]
    assert torch.isfinite(losses).all() and torch.isfinite(gradient).all() and (gradient[empty] == 0).all()
    kl = trust_region(inputs["log_prob"], inputs["old_log_prob"], inputs["mask"]) / inputs["mask"].sum()
    _close(kl.detach(), outputs["tr_kl"], "tr_kl")


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=LIMIT, rtol=0, msg=lambda text: f"{what}: {text}")
