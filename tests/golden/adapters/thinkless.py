"""Thinkless: the authors' loss and advantage, an independent sequence form and weights, and the authors' rewards."""

from __future__ import annotations

import re
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.losses import masked_mean
from trl_ext_plugins.thinkless import ThinklessOptions, boxed_match, mode_reward
from trl_ext_plugins.thinkless.degrpo import (
    clipped_surrogate,
    control_tokens,
    sequence_mean_weights,
    token_mean_weights,
)

LIMIT = 1e-9


def compare(case: dict[str, Any]) -> None:
    kinds = {"policy_loss": _loss, "advantage": _advantage, "reward": _reward, "rewards_to_loss": _chain}
    kinds[case["inputs"]["kind"]](case["inputs"], case["outputs"], dict(case["hyperparameters"]))


def _tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(found, _tensor(expected), atol=LIMIT, rtol=0, msg=lambda text: f"{what}: {text}")


def _two_means(
    logps: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, weights: Any, eps: float
) -> torch.Tensor:
    """(B, T) losses of weighted advantages, as the trainer sees them."""
    return clipped_surrogate(logps, old, advantages.unsqueeze(1) * mask * weights, eps, eps) * mask


def _loss(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    alpha, eps = settings.pop("alpha"), settings.pop("cliprange")
    assert not settings, f"unknown settings {set(settings)}"
    ThinklessOptions(alpha=alpha)
    logps = _tensor(inputs["log_prob"]).requires_grad_()
    old, advantages, mask = (_tensor(inputs[name]) for name in ("old_log_prob", "advantages", "completion_mask"))

    def check(weights: Any, form: str, loss: str, gradient: str) -> None:
        losses = _two_means(logps, old, advantages, mask, weights, eps)
        found = masked_mean(losses, mask, dim=1).mean() if form == "sequence" else masked_mean(losses, mask)
        _close(found.detach(), outputs[loss], loss)
        _close(torch.autograd.grad(found, logps)[0], outputs[gradient], gradient)

    if alpha is None:
        check(1.0, "token", "loss_official", "grad_log_prob_official")
        return
    control = control_tokens(torch.zeros_like(mask), mask)
    weights = token_mean_weights(control, mask, alpha, control.sum(), mask.sum())
    _close(weights, outputs["token_mean_weights"], "token_mean_weights")
    check(weights, "token", "loss_official_guarded", "grad_log_prob_official_guarded")
    if outputs["loss_official"] != "nan":
        check(weights, "token", "loss_official", "grad_log_prob_official")
    weights = sequence_mean_weights(control, mask, alpha)
    _close(weights, outputs["sequence_mean_weights"], "sequence_mean_weights")
    check(weights, "sequence", "loss_sequence_mean_form", "grad_log_prob_sequence_mean_form")


def _advantages(inputs: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor:
    names = sorted(set(inputs["group_index"]))
    groups = torch.tensor([names.index(name) for name in inputs["group_index"]])
    scale, eps = settings.pop("std_normalizer"), settings.pop("epsilon", 1e-6)
    return group_normalize(_tensor(inputs["rewards"]), groups, scale=scale, eps=eps)


def _advantage(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    """The trainer's own advantage; the official code gives a group of one its raw reward, here it gets 0."""
    found = _advantages(inputs, settings)
    assert not settings, f"unknown settings {set(settings)}"
    alone = torch.tensor([inputs["group_index"].count(name) == 1 for name in inputs["group_index"]])
    _close(found[~alone], _tensor(outputs["advantages"])[~alone].tolist(), "advantages")
    assert (found[alone] == 0).all()


def _chain(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    alpha, eps = settings.pop("alpha"), settings.pop("cliprange")
    advantages = _advantages(inputs, settings)
    assert not settings, f"unknown settings {set(settings)}"
    mask = _tensor(inputs["completion_mask"])
    assert mask.sum(1).tolist() == inputs["completion_lengths"]
    _close(advantages.unsqueeze(1) * mask, outputs["advantages_token"], "advantages_token")
    logps, old = _tensor(inputs["log_prob"]).requires_grad_(), _tensor(inputs["old_log_prob"])
    control = control_tokens(torch.zeros_like(mask), mask)
    weights = token_mean_weights(control, mask, alpha, control.sum(), mask.sum())
    for weight, loss, gradient in (
        (weights, "loss_official", "grad_log_prob_official"),
        (1.0, "loss_vanilla_token_mean", "grad_log_prob_vanilla"),
    ):
        found = masked_mean(_two_means(logps, old, advantages, mask, weight, eps), mask)
        _close(found.detach(), outputs[loss], loss)
        _close(torch.autograd.grad(found, logps)[0], outputs[gradient], gradient)


def _reward(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    """The official rules but for one row: thoughts that name `<short>` stay thoughts, by their first token."""
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
    found = reward(
        completions=[item["text"] for item in inputs["items"]],
        thinkless_mode=modes,
        thinkless_answer=answers,
        ground_truth=[item["ground_truth"] for item in inputs["items"]],
    )
    for item, ours, official in zip(inputs["items"], found, outputs["rewards_official"], strict=True):
        named = item["text"].startswith("<think>") and "<short>" in item["text"]
        assert ours == (settings["correct_think_reward"] if named else official), item
