"""GDPO: the authors' TRL fork and TRL 1.16 (variant `trl`), and the authors' verl fork (variant `verl`).

Where the official code has NaN for want of a deviation (a group or a batch of one), the plugin gives 0.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_plugins.gdpo import GDPO, condition_rewards, decoupled_sum, gdpo_advantages, whiten_tokens

KNOWN = {"group_eps", "batch_eps", "var_eps", "ddof", "batch_norm"}


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
    """Returns a float64 tensor of a list, or of a list of lists; null is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _close(ours: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    torch.testing.assert_close(
        ours.double(), expected, atol=limit, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def _trl(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    rewards = _tensor(inputs["rewards_per_func"])
    weights = _tensor(inputs["reward_weights"])
    group_ids = torch.arange(len(rewards)) // inputs["num_generations"]
    eps = settings.get("group_eps", 1e-4)
    if condition := inputs.get("condition"):
        rewards = _conditioned(rewards, condition, _tensor(outputs["rewards_used"]))
    if rewards.shape[1] == 1:
        _single(rewards, weights, group_ids, outputs, eps)
        return

    filled = rewards.nan_to_num()
    if "per_reward_advantages" in outputs:
        expected = _tensor(outputs["per_reward_advantages"]).nan_to_num()
        ours = group_normalize(filled, group_ids, eps=eps).nan_to_num()
        _close(ours, expected, 1e-6, "per_reward_advantages")
    if "pre_bn_advantages" in outputs:
        ours = decoupled_sum(filled, weights, group_ids, eps=eps)
        _close(ours, _tensor(outputs["pre_bn_advantages"]), 1e-6, "pre_bn_advantages")
    options = {"group_eps": eps, "batch_eps": settings.get("batch_eps", 1e-4)}
    options["batch_norm"] = settings.get("batch_norm", True)
    for policy, name in (("zero", "advantages_official"), ("exclude", "advantages_trl116")):
        if name in outputs:
            expected = _tensor(outputs[name]).nan_to_num()

            def ours_of(values: torch.Tensor, nan_policy: Any = policy) -> torch.Tensor:
                return gdpo_advantages(values, weights, group_ids, nan_policy=nan_policy, **options)

            _both_precisions(case, ours_of, rewards, expected, name)


def _both_precisions(
    case: dict[str, Any], function: Any, rewards: torch.Tensor, expected: torch.Tensor, what: str
) -> None:
    """Compares in float64, and in float32 up to what rounding the rewards alone changes."""
    exact = function(rewards)
    _close(exact, expected, 1e-6, f"{what}, float64")
    single = function(rewards.float())
    assert single.dtype == torch.float32
    rounding = (function(rewards.float().double()) - exact).abs().max().item() if len(exact) else 0.0
    if "degenerate" in case["name"]:
        assert (single.abs() < 1e-2).all(), f"{what}, float32: {single}"
    _close(single, expected, 1e-4 + rounding, f"{what}, float32")


def _conditioned(rewards: torch.Tensor, condition: dict[str, Any], expected: torch.Tensor) -> torch.Tensor:
    """Returns the file's conditioned rewards. The plugin differs from them on rows where one of the two is NaN."""
    target, on = condition["target"], condition["on"]
    ours = condition_rewards(rewards, target, on, condition["threshold"])
    known = ~(rewards[:, target].isnan() | rewards[:, on].isnan())
    _close(ours[known], expected[known], 0.0, "rewards_used")
    return expected


def _single(
    rewards: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor, outputs: dict[str, Any], eps: float
) -> None:
    """Checks that one reward is left to TRL's plain GRPO, as in the official code."""
    asked = types.SimpleNamespace(rewards=rewards, reward_names=("only",), group_ids=group_ids, log=lambda *_: None)
    assert GDPO().advantages(round=asked) is None
    if "advantages_official" in outputs:
        plain = group_normalize((rewards * weights).nansum(1), group_ids, eps=eps)
        _close(plain, _tensor(outputs["advantages_official"]).nan_to_num(), 1e-6, "advantages_official")


def _verl(case: dict[str, Any]) -> None:
    inputs, settings = case["inputs"], case["hyperparameters"]
    scores, lengths = _tensor(inputs["scores"]), torch.tensor(inputs["lengths"])
    weights = torch.ones(scores.shape[1], dtype=torch.float64)
    group_ids = torch.arange(len(scores)) // inputs["num_generations"]
    mask = (torch.arange(inputs["T"]) < lengths.unsqueeze(1)).double()  # (N, T)
    eps, var_eps = settings.get("group_eps", 1e-6), settings.get("var_eps", 1e-8)

    def ours_of(values: torch.Tensor) -> torch.Tensor:
        if var_eps == 1e-8:  # the plugin's own number
            rows = gdpo_advantages(values, weights, group_ids, group_eps=eps, lengths=lengths, nan_policy="zero")
        else:
            total = decoupled_sum(values.nan_to_num(), weights, group_ids, eps=eps)
            rows = whiten_tokens(total, lengths, eps=var_eps).to(values.dtype)
        return rows.unsqueeze(1) * mask.to(rows.dtype)

    _both_precisions(case, ours_of, scores, _tensor(case["outputs"]["advantages"]).nan_to_num(), "advantages")
