"""GDPO: the authors' TRL fork and TRL 1.16 (variant `trl`), and the authors' verl fork (variant `verl`)."""

from __future__ import annotations

import math
import types
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.gdpo import GDPO, GDPOOptions, condition_rewards, decoupled_sum, gdpo_advantages

KNOWN = {"group_eps", "batch_eps", "var_eps", "ddof", "batch_norm"}
LIMITS = ((torch.float64, 1e-6), (torch.float32, 1e-4))


def compare(case: dict[str, Any]) -> None:
    unknown = case["hyperparameters"].keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    assert case["hyperparameters"].get("ddof", 1) == 1, "the plugin divides by n - 1 only"
    if case["variant"] == "verl":
        _verl(case)
    else:
        assert case["variant"] == "trl", f"unknown variant {case['variant']!r}"
        _trl(case)


def _tensor(values: list[Any]) -> torch.Tensor:
    """A float64 tensor of a list, or of a list of lists; null is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _groups(rows: int, size: int) -> torch.Tensor:
    return torch.arange(rows) // size


def _close(found: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    torch.testing.assert_close(found.double(), expected, atol=limit, rtol=0, msg=lambda text: f"{what}: {text}")


def _trl(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    given = _tensor(inputs["rewards_per_func"])
    weights = torch.tensor(inputs["reward_weights"], dtype=torch.float64)
    group_ids = _groups(len(given), inputs["num_generations"])
    rewards = given
    if condition := inputs.get("condition"):
        rewards = condition_rewards(given, condition["target"], condition["on"], condition["threshold"])
        _close(rewards, _tensor(outputs["rewards_used"]), 0.0, "rewards_used")
    options = {"group_eps": settings["group_eps"], "batch_eps": settings["batch_eps"]}
    if rewards.shape[1] == 1:
        _single(rewards, weights, group_ids, outputs, settings["group_eps"])
        return

    filled = torch.nan_to_num(rewards)
    if "per_reward_advantages" in outputs:
        # a group of one has no deviation: the official code gets NaN and drops it, we get 0 at once
        expected = _tensor(outputs["per_reward_advantages"]).nan_to_num()
        _close(group_normalize(filled, group_ids, eps=settings["group_eps"]), expected, 1e-6, "per_reward_advantages")
    if "pre_bn_advantages" in outputs:
        found = decoupled_sum(filled, weights, group_ids, eps=settings["group_eps"])
        _close(found, _tensor(outputs["pre_bn_advantages"]), 1e-6, "pre_bn_advantages")
    for dtype, limit in LIMITS:
        for policy, name in (("zero", "advantages_official"), ("exclude", "advantages_trl116")):
            if name not in outputs:
                continue
            found = gdpo_advantages(rewards.to(dtype), weights, group_ids, nan_policy=policy, **options)
            assert found.dtype == dtype
            if "degenerate" in case["name"]:
                assert (found == 0).all(), f"{name}, {dtype}: {found}"
            # one row alone has no deviation either: NaN in the official code, 0 here
            _close(found, _tensor(outputs[name]).nan_to_num(), limit, f"{name}, {dtype}")


def _single(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, outputs: dict[str, Any], eps: float
) -> None:
    """One reward: the plugin leaves TRL's plain GRPO alone, and so does the official code."""
    asked = types.SimpleNamespace(rewards=rewards, reward_weights=weights, group_ids=group_ids)
    assert GDPO(GDPOOptions()).advantages(round=asked) is None
    plain = group_normalize((rewards * weights).sum(1), group_ids, eps=eps)
    _close(plain, _tensor(outputs["advantages_official"]), 1e-6, "advantages_official")


def _verl(case: dict[str, Any]) -> None:
    inputs, settings = case["inputs"], case["hyperparameters"]
    scores, lengths = _tensor(inputs["scores"]), torch.tensor(inputs["lengths"])
    group_ids = _groups(len(scores), inputs["num_generations"])
    assert settings["var_eps"] == 1e-8, "the plugin has this number fixed"
    mask = (torch.arange(inputs["T"]) < lengths.unsqueeze(1)).double()  # (N, T)
    for dtype, limit in LIMITS:
        found = gdpo_advantages(
            scores.to(dtype),
            torch.ones(scores.shape[1], dtype=torch.float64),
            group_ids,
            group_eps=settings["group_eps"],
            lengths=lengths,
        )
        tokens = found.double().unsqueeze(1) * mask
        _close(tokens, _tensor(case["outputs"]["advantages"]), limit, f"advantages, {dtype}")
        if "degenerate" in case["name"]:
            assert (tokens == 0).all()
