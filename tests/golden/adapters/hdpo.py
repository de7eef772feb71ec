"""HDPO: the authors' code (Metis), its advantages (kind `advantage`) and both losses with gradients (kind `loss`)."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_hooks.toolkit.losses import masked_mean
from trl_ext_plugins.hdpo import (
    accuracy_advantages,
    clipped_surrogate,
    importance_ratio,
    tool_advantages,
    tool_rewards,
)

LIMITS = ((torch.float64, 1e-6), (torch.float32, 1e-4))
KNOWN = {"w_ans", "w_fmt", "eps", "ddof", "scale_by_std", "w_acc", "w_tool", "loss_agg"}
KNOWN |= {"clip_ratio_low", "clip_ratio_high", "clip_ratio_c"}


def compare(case: dict[str, Any]) -> None:
    settings = case["hyperparameters"]
    assert not settings.keys() - KNOWN, f"the adapter does not know {settings.keys() - KNOWN}"
    assert settings.get("ddof", 1) == 1, "the plugin divides by n - 1 only"
    for dtype, limit in LIMITS:
        accuracy, tool = _advantages(case, dtype, limit)
        if case["kind"] == "loss":
            _loss(case, accuracy, tool, dtype, limit)
        else:
            assert case["kind"] == "advantage", f"unknown kind {case['kind']!r}"


def _advantages(case: dict[str, Any], dtype: torch.dtype, limit: float) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    answer = torch.tensor(inputs["answer_score"], dtype=dtype)
    form = torch.tensor(inputs["format_score"], dtype=dtype)
    calls, correct = torch.tensor(inputs["tool_calls"]), answer > 0
    size = inputs["num_generations"]
    group_ids = torch.arange(len(calls)) // size
    rewards = settings.get("w_ans", 0.9) * answer + settings.get("w_fmt", 0.1) * form
    options = {"eps": settings["eps"], "scale": settings.get("scale_by_std", True)}
    accuracy = accuracy_advantages(rewards, group_ids, **options)
    tool = tool_advantages(calls, correct, group_ids, **options)
    if "acc_reward" in outputs:
        _close(rewards, outputs["acc_reward"], limit, "acc_reward")
        _close(tool_rewards(calls, correct), outputs["tool_reward"], limit, "tool_reward")
        assert (tool != 0).long().tolist() == outputs["tool_signal"], f"tool_signal, {dtype}"
    if size == 1:  # the authors keep the raw score, a group of one says nothing here
        raw = [value / (1 + settings["eps"]) for value in outputs["acc_reward"]]
        _close(torch.tensor(raw), outputs["acc_advantage"], 1e-6, "the authors' raw score")
        assert (accuracy == 0).all()
    else:
        _close(accuracy, outputs["acc_advantage"], limit, f"acc_advantage, {dtype}")
    _close(tool, outputs["tool_advantage"], limit, f"tool_advantage, {dtype}")
    return accuracy.to(dtype), tool.to(dtype)


def _loss(case: dict[str, Any], accuracy: torch.Tensor, tool: torch.Tensor, dtype: torch.dtype, limit: float) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    assert settings["loss_agg"] == "token-mean"
    logps = torch.tensor(inputs["log_prob"], dtype=dtype, requires_grad=True)
    old, mask = torch.tensor(inputs["old_log_prob"], dtype=dtype), torch.tensor(inputs["response_mask"])
    ratio = importance_ratio(logps, old, mask)
    clip = settings["clip_ratio_low"], settings["clip_ratio_high"], settings["clip_ratio_c"]
    loss_acc = masked_mean(clipped_surrogate(ratio, accuracy.unsqueeze(1), *clip), mask)
    signal = (tool != 0).to(dtype).unsqueeze(1)
    loss_tool = masked_mean(clipped_surrogate(ratio, tool.unsqueeze(1), *clip), mask * signal)
    total = settings["w_acc"] * loss_acc + settings["w_tool"] * loss_tool
    total.backward()
    found = {"loss_acc": loss_acc, "loss_tool": loss_tool, "pg_loss": total, "grad_log_prob": logps.grad}
    for name, value in found.items():
        assert value is not None
        _close(value.detach(), outputs[name], limit, f"{name}, {dtype}")


def _close(found: torch.Tensor, expected: Any, limit: float, what: str) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, atol=limit, rtol=0, msg=lambda text: f"{what}: {text}")
