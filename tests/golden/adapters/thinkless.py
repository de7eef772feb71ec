"""Thinkless: the authors' loss and advantage, an independent sequence form and weights, and the authors' rewards.

Three things differ by design. Where the official loss is 0/0, the plugin's is finite. A group of one keeps its raw
reward there and gets 0 here. The mode of an answer is its first token, and not whether its text holds `<short>`.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.losses import clipped_surrogate, masked_mean
from trl_ext_plugins.thinkless import Thinkless, boxed_match, mode_reward
from trl_ext_plugins.thinkless.maths import control_tokens, sequence_mean_weights, token_mean_weights

LIMIT = 1e-9


def compare(case: dict[str, Any]) -> None:
    kinds = {"policy_loss": _loss, "advantage": _advantage, "reward": _reward, "rewards_to_loss": _chain}
    kinds[case["inputs"]["kind"]](case["inputs"], case["outputs"], dict(case["hyperparameters"]))


def _tensor(values: Any) -> torch.Tensor:
    """Returns a float64 tensor of a number, a list, or a list of lists; null and the text `nan` are NaN."""
    if isinstance(values, list) and values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    if isinstance(values, list):
        return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)
    return torch.tensor(math.nan if values is None else float(values), dtype=torch.float64)


def _close(ours: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(ours, _tensor(expected), atol=LIMIT, rtol=0, msg=lambda text: f"{what}: {text}")


def _two_means(
    logps: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, weights: Any, eps: float
) -> torch.Tensor:
    """Returns (B, T) losses of weighted advantages, as the trainer sees them."""
    return clipped_surrogate(torch.exp(logps - old), advantages.unsqueeze(1) * mask * weights, eps, eps) * mask


def _logps(inputs: dict[str, Any], mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns new and old log-probabilities; what stands on padding is nobody's, so it may be infinite."""
    new, old = (_tensor(inputs[name]) for name in ("log_prob", "old_log_prob"))
    new, old = (torch.where(mask == 0, values.nan_to_num(0.0, 0.0, 0.0), values) for values in (new, old))
    return new.requires_grad_(), old


def _check(
    losses: torch.Tensor, logps: torch.Tensor, loss: torch.Tensor, outputs: Any, name: str, gradient: str
) -> None:
    """Compares a loss and its gradient, unless the file lacks them or has 0/0 there."""
    if name not in outputs or _tensor(outputs[name]).isnan():
        assert torch.isfinite(loss)
        return
    _close(loss.detach(), outputs[name], name)
    if gradient in outputs:
        _close(torch.autograd.grad(loss, logps)[0], outputs[gradient], gradient)


def _loss(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    alpha, eps = settings.pop("alpha"), settings.pop("cliprange")
    assert not settings, f"unknown settings {set(settings)}"
    Thinkless.Options(alpha=alpha)
    advantages, mask = _tensor(inputs["advantages"]), _tensor(inputs["completion_mask"])
    logps, old = _logps(inputs, mask)

    def check(weights: Any, form: str, loss: str, gradient: str) -> None:
        losses = _two_means(logps, old, advantages, mask, weights, eps)
        ours = masked_mean(losses, mask, dim=1).mean() if form == "sequence" else masked_mean(losses, mask)
        _check(losses, logps, ours, outputs, loss, gradient)

    if alpha is None:
        check(1.0, "token", "loss_official", "grad_log_prob_official")
        return
    control = control_tokens(torch.zeros_like(mask), mask)
    weights = token_mean_weights(control, mask, alpha, control.sum(), mask.sum())
    rows = sequence_mean_weights(control, mask, alpha)
    for name, ours in (("token_mean_weights", weights), ("sequence_mean_weights", rows)):
        if name in outputs:
            _close(ours, outputs[name], name)
    check(weights, "token", "loss_official_guarded", "grad_log_prob_official_guarded")
    check(weights, "token", "loss_official", "grad_log_prob_official")
    check(rows, "sequence", "loss_sequence_mean_form", "grad_log_prob_sequence_mean_form")


def _advantages(inputs: dict[str, Any], settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the trainer's advantages of a case, and those with the raw rewards of groups of one, as the authors'."""
    names = sorted(set(inputs["group_index"]))
    groups = torch.tensor([names.index(name) for name in inputs["group_index"]])
    scale, eps = settings.pop("std_normalizer"), settings.pop("epsilon", 1e-6)
    rewards = _tensor(inputs["rewards"])
    ours = group_normalize(rewards, groups, scale=scale, eps=eps)
    alone = groups.bincount()[groups] == 1
    assert (ours[alone] == 0).all()
    return ours, torch.where(alone, rewards / (1 + eps if scale else 1), ours)


def _advantage(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    _, theirs = _advantages(inputs, settings)
    assert not settings, f"unknown settings {set(settings)}"
    _close(theirs, outputs["advantages"], "advantages")


def _chain(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    alpha, eps = settings.pop("alpha"), settings.pop("cliprange")
    _, advantages = _advantages(inputs, settings)
    assert not settings, f"unknown settings {set(settings)}"
    mask = _tensor(inputs["completion_mask"])
    if "completion_lengths" in inputs:
        assert mask.sum(1).tolist() == inputs["completion_lengths"]
    _close(advantages.unsqueeze(1) * mask, outputs["advantages_token"], "advantages_token")
    logps, old = _logps(inputs, mask)
    control = control_tokens(torch.zeros_like(mask), mask)
    weights: Any = 1.0
    if alpha is not None:
        weights = token_mean_weights(control, mask, alpha, control.sum(), mask.sum())
    for weight, loss, gradient in (
        (weights, "loss_official", "grad_log_prob_official"),
        (1.0, "loss_vanilla_token_mean", "grad_log_prob_vanilla"),
    ):
        losses = _two_means(logps, old, advantages, mask, weight, eps)
        _check(losses, logps, masked_mean(losses, mask), outputs, loss, gradient)


def _reward(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compares with the official rules, but for rows that hold a further control token behind their first token."""
    rename = {f"{name}_{mode}_reward": (name, mode) for name in ("correct", "wrong") for mode in ("think", "short")}
    assert set(settings) == set(rename)
    given = {mode if name == "correct" else f"wrong_{mode}": settings[key] for key, (name, mode) in rename.items()}
    reward = mode_reward(boxed_match, reference="ground_truth", **given)
    modes, answers = [], []
    for item in inputs["items"]:
        opening = re.match(r"<(think|short)>", item["text"])
        modes.append(opening and opening[1])
        rest = item["text"][opening.end() :] if opening else ""
        _, closed, after = rest.partition("</think>")
        thought = after if closed else None
        answers.append(thought if modes[-1] == "think" else rest)
    ours = reward(
        completions=[item["text"] for item in inputs["items"]],
        thinkless_mode=modes,
        thinkless_answer=answers,
        ground_truth=[item["ground_truth"] for item in inputs["items"]],
    )
    for item, mode, answer, value, official in zip(
        inputs["items"], modes, answers, ours, outputs["rewards_official"], strict=True
    ):
        further = re.search(r"<(think|short)>", item["text"][1:])
        if not further:
            assert value == official, item
        elif mode is None or answer is None:
            assert value == -1.0, item
        else:
            right = boxed_match(answer, item["ground_truth"])
            assert value == settings[f"{'correct' if right else 'wrong'}_{mode}_reward"], item
