"""TRPA: the authors' functions, one micro-batch per case.

A completion without a token divides 0 by 0 there. The plugin leaves it out, so a case with such a row is compared in
everything that stays finite there.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.losses import sequence_log_ratio
from trl_ext_plugins.trpa import (
    KL_CLAMP,
    TRPA,
    pair_factors,
    penalty,
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
    inputs = {name: _tensor(values) for name, values in case["inputs"].items()}
    logps, mask, levels = inputs["log_prob"].requires_grad_(), inputs["mask"], inputs["preference_levels"]
    rho = sequence_log_ratio(logps, inputs["ref_log_prob"], mask)  # (N,)
    empty = mask.sum(dim=1) == 0
    assert (rho[empty] == 0).all()
    _close(rho.masked_fill(empty, math.nan), outputs["seq_log_ratio"], "seq_log_ratio")

    levels = levels.masked_fill(empty, math.nan)
    pairs = preference_pairs(levels, inputs["group_id"])
    factors = pair_factors(levels, pairs, settings["beta"], settings["anisotropy"])
    official = {(i, j): factor for i, j, factor in outputs["pairs"]}
    assert len(official) == outputs["num_pairs"] and (not official) == outputs["fallback"]
    expected = {pair: factor for pair, factor in official.items() if not empty[list(pair)].any()}
    assert {tuple(pair) for pair in pairs.tolist()} == expected.keys() and len(pairs) == len(expected)
    _close(factors, [expected[i, j] for i, j in pairs.tolist()], "factors")

    losses = preference_losses(rho, pairs, factors) if len(pairs) else unary_losses(rho, levels)
    preference = losses.sum() / max(len(losses), 1)
    kl = trust_region(logps, inputs["old_log_prob"], mask) / mask.sum()
    total = preference + settings["tr_kl_coef"] * penalty(kl, settings["use_sqrt_trkl"])
    _close(kl, outputs["tr_kl"], "tr_kl")
    left_out = empty.any() and (expected != official or not official)
    for name, value in (("preference", preference), ("total", total)):
        gradient = torch.autograd.grad(value, logps, retain_graph=True)[0]
        assert (gradient[empty] == 0).all()
        if left_out:  # the official loss is NaN, and ours is that of the other rows
            assert outputs[f"{name}_loss"] is None and torch.isfinite(losses).all()
            continue
        _close(value, outputs[f"{name}_loss"], f"{name}_loss")
        wanted = _tensor(outputs[f"grad_{name}"])
        wanted[empty] = 0  # 0 times NaN there
        torch.testing.assert_close(gradient, wanted, atol=LIMIT, rtol=LIMIT, equal_nan=True)


def _tensor(values: Any) -> torch.Tensor:
    """Makes a float64 tensor of nested lists; null is NaN, and the texts `inf` and `-inf` are infinite."""
    if isinstance(values, list):
        return torch.stack([_tensor(value) for value in values]) if values else torch.zeros(0, dtype=torch.float64)
    return torch.tensor(math.nan if values is None else float(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), _tensor(expected), atol=LIMIT, rtol=LIMIT, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
