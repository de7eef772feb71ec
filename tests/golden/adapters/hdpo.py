"""HDPO: the authors' code (Metis), its advantages (kind `advantage`) and both losses with gradients (kind `loss`).

Two things differ by design. The authors keep the raw score of a group of one, which says nothing here. A rollout at the
mean of the right ones has a tool advantage of exactly 0 here, and a signal where rounding leaves it one there.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.losses import clipped_surrogate, masked_mean
from trl_ext_plugins.hdpo import accuracy_advantages, importance_ratio, tool_advantages, tool_rewards

LIMITS = ((torch.float64, 1e-6), (torch.float32, 1e-4))
KNOWN = {"w_ans", "w_fmt", "eps", "ddof", "scale_by_std", "w_acc", "w_tool", "loss_agg"}
KNOWN |= {"clip_ratio_low", "clip_ratio_high", "clip_ratio_c"}


def compare(case: dict[str, Any]) -> None:
    settings = case["hyperparameters"]
    assert not settings.keys() - KNOWN, f"the adapter does not know {settings.keys() - KNOWN}"
    assert settings.get("ddof", 1) == 1, "the plugin divides by n - 1 only"
    for dtype, limit in LIMITS:
        accuracy, tool, signal = _advantages(case, dtype, limit)
        if case["kind"] == "loss":
            _loss(case, accuracy, tool, signal, dtype, limit)
        else:
            assert case["kind"] == "advantage", f"unknown kind {case['kind']!r}"


def _tensor(values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Returns a tensor of a number, a list, or a list of lists; null is NaN."""
    if isinstance(values, list) and values and isinstance(values[0], list):
        return torch.stack([_tensor(row, dtype) for row in values])
    if isinstance(values, list):
        return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=dtype)
    return torch.tensor(math.nan if values is None else float(values), dtype=dtype)


def _close(ours: torch.Tensor, expected: Any, limit: float, what: str) -> None:
    torch.testing.assert_close(
        ours.double(), _tensor(expected), atol=limit, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def _advantages(
    case: dict[str, Any], dtype: torch.dtype, limit: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compares both advantages; returns them and who has a tool signal, as the loss of the authors uses them."""
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    answer, form = _tensor(inputs["answer_score"], dtype), _tensor(inputs["format_score"], dtype)
    calls, correct = torch.tensor(inputs["tool_calls"]), answer > 0
    size, eps, scale = inputs["num_generations"], settings.get("eps", 1e-6), settings.get("scale_by_std", True)
    group_ids = torch.arange(len(calls)) // size
    rewards = settings.get("w_ans", 0.9) * answer + settings.get("w_fmt", 0.1) * form
    accuracy = accuracy_advantages(rewards, group_ids, eps=eps, scale=scale)
    tool = tool_advantages(calls, correct, group_ids, eps=eps, scale=scale)
    signal = tool != 0
    if "acc_reward" in outputs:
        _close(rewards, outputs["acc_reward"], limit, "acc_reward")
    if "tool_reward" in outputs:
        _close(tool_rewards(calls, correct), outputs["tool_reward"], limit, "tool_reward")
    if size == 1:
        raw = rewards.double() / (1 + eps if scale else 1)
        _close(raw, outputs["acc_advantage"], limit, "the authors' raw score")
        assert (accuracy == 0).all()
        accuracy = raw
    else:
        _close(accuracy, outputs["acc_advantage"], limit, f"acc_advantage, {dtype}")
    expected = _tensor(outputs["tool_advantage"])
    _close(tool, outputs["tool_advantage"], limit, f"tool_advantage, {dtype}")
    theirs = torch.tensor(outputs["tool_signal"]) if "tool_signal" in outputs else (expected != 0).long()
    # a right rollout among others may hit their mean up to rounding: the authors see a signal then, and there is none
    several = group_ids.bincount(weights=correct.double())[group_ids] > 1
    noise = correct & several & (expected.abs() < 1e-6) & (tool == 0)
    assert signal.long()[~noise].tolist() == theirs[~noise].tolist(), f"tool_signal, {dtype}"
    return accuracy.to(dtype), tool.to(dtype), theirs.bool()


def _loss(
    case: dict[str, Any],
    accuracy: torch.Tensor,
    tool: torch.Tensor,
    signal: torch.Tensor,
    dtype: torch.dtype,
    limit: float,
) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    assert settings.get("loss_agg", "token-mean") == "token-mean", "the golden losses are means over tokens"
    mask = _tensor(inputs["response_mask"], dtype)
    logps, old = (_tensor(inputs[name], dtype) for name in ("log_prob", "old_log_prob"))
    # what stands on padding is nobody's log-probability, so it may be infinite
    logps, old = (torch.where(mask == 0, values.nan_to_num(0.0, 0.0, 0.0), values) for values in (logps, old))
    logps.requires_grad_()
    ratio = importance_ratio(logps, old, mask)
    clip = settings["clip_ratio_low"], settings["clip_ratio_high"], settings.get("clip_ratio_c")
    loss_acc = masked_mean(clipped_surrogate(ratio, accuracy.unsqueeze(1), *clip), mask)
    loss_tool = masked_mean(clipped_surrogate(ratio, tool.unsqueeze(1), *clip), mask * signal.unsqueeze(1))
    total = settings.get("w_acc", 1.0) * loss_acc + settings["w_tool"] * loss_tool
    total.backward()
    found = {"loss_acc": loss_acc, "loss_tool": loss_tool, "pg_loss": total, "grad_log_prob": logps.grad}
    for name, value in found.items():
        if name in outputs:
            assert value is not None
            _close(value.detach(), outputs[name], limit, f"{name}, {dtype}")
