"""P3O: the first author's functions for V1, V2, the token-wise form and running moments; all pairs as derived there."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_hooks.toolkit.moments import add_to_moments, running_std
from trl_ext_plugins.p3o import (
    P3O,
    importance,
    joint_clipping,
    reward_gap,
    separate_clipping,
    token_clipping,
)

LIMIT = 1e-9
SIDES = ("1", "2")


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], dict(case["hyperparameters"])
    if "score_batches" in inputs:
        _moments(inputs, outputs, settings)
        return
    assert settings.pop("pairing", "all") == "all"
    assert set(settings) == {"variant", "kl_coef", "cliprange", "cliprange_ratio"}, f"unknown settings {set(settings)}"
    P3O.Options(**settings)  # the plugin takes them as they are
    if settings["variant"] == "v2_token":
        _tokens(inputs, outputs, settings)
    elif "rewards" in inputs:
        _all_pairs(inputs, outputs, settings)
    else:
        _pairs(inputs, outputs, settings)


def _tensor(values: Any) -> torch.Tensor:
    """Makes a float64 tensor of nested lists; null is NaN, and the texts `inf` and `-inf` are infinite."""
    if isinstance(values, list):
        return torch.stack([_tensor(value) for value in values]) if values else torch.zeros(0, dtype=torch.float64)
    return torch.tensor(math.nan if values is None else float(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), _tensor(expected), atol=LIMIT, rtol=LIMIT, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def _loss(
    scores: tuple[torch.Tensor, torch.Tensor],
    old: tuple[torch.Tensor, torch.Tensor],
    gap: torch.Tensor,
    settings: dict[str, Any],
) -> torch.Tensor:
    """Returns the mean over the pairs; 0, with a gradient, without any."""
    clip = (settings["cliprange"], settings["cliprange_ratio"])
    ratios = (scores[0] - old[0], scores[1] - old[1])
    if settings["variant"] == "v1":
        losses, _ = separate_clipping(ratios, gap, *clip)
    else:
        losses, _ = joint_clipping(ratios, old, gap, *clip)
    return losses.sum() / max(len(losses), 1)


def _pairs(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    one, two = (_tensor(inputs[f"logratio_{side}"]).requires_grad_() for side in SIDES)
    old = tuple(_tensor(inputs[f"old_logratio_{side}"]) for side in SIDES)
    rewards = tuple(_tensor(inputs[f"reward_{side}"]) for side in SIDES)
    gap = reward_gap(rewards, (one, two), settings["kl_coef"])
    _close(gap, outputs["q"], "q")
    limit = settings["cliprange_ratio"]
    if settings["variant"] == "v1":
        for score, before, expected in zip((one, two), old, outputs["importance"], strict=True):
            _close(importance(score - before, limit), expected, "importance")
    else:
        _close(importance(one - old[0] + two - old[1], limit), outputs["importance"], "importance")
    loss = _loss((one, two), old, gap, settings)
    loss.backward()
    if outputs["loss"] is not None or len(gap):
        _close(loss, outputs["loss"], "loss")
    _close(one.grad, outputs["grad_logratio_1"], "gradient of the first")
    _close(two.grad, outputs["grad_logratio_2"], "gradient of the second")


def _all_pairs(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    scores = _tensor(inputs["logratio"]).requires_grad_()
    old, rewards = (_tensor(inputs[name]).flatten() for name in ("old_logratio", "rewards"))
    prompts, group = scores.shape
    first, second = group_pairs(torch.arange(prompts * group) // max(group, 1), ~rewards.isnan()).T
    assert len(first) == outputs["num_pairs"]
    flat = scores.flatten()
    sides = (flat[first], flat[second])
    gap = reward_gap((rewards[first], rewards[second]), sides, settings["kl_coef"])
    loss = _loss(sides, (old[first], old[second]), gap, settings)
    loss.backward()
    if outputs["loss"] is not None or len(first):  # a mean over no pair is NaN there and nothing here
        _close(loss, outputs["loss"], "loss")
        _close(scores.grad, outputs["grad_logratio"], "gradient")
    else:
        assert loss == 0 and (scores.grad == 0).all()


def _tokens(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    one, two = (_tensor(inputs[f"logprobs_{side}"]).requires_grad_() for side in SIDES)
    old, reference, masks, rewards = (
        tuple(_tensor(inputs[f"{name}_{side}"]) for side in SIDES)
        for name in ("old_logprobs", "ref_logprobs", "masks", "reward")
    )
    scores = tuple(((new - ref) * mask).sum(1) for new, ref, mask in zip((one, two), reference, masks, strict=True))
    gap = reward_gap(rewards, scores, settings["kl_coef"])
    values, _ = token_clipping((one, two), old, masks, gap, settings["cliprange"], settings["cliprange_ratio"])
    loss = values.sum() / (masks[0].sum() + masks[1].sum())
    loss.backward()
    _close(loss, outputs["loss"], "loss")
    _close(one.grad, outputs["grad_logprobs_1"], "gradient of the first")
    _close(two.grad, outputs["grad_logprobs_2"], "gradient of the second")


def _moments(inputs: dict[str, Any], outputs: dict[str, Any], settings: dict[str, Any]) -> None:
    assert settings.pop("scale_reward") == "running"
    limit = settings.pop("cliprange_reward", None)
    assert not settings, f"unknown settings {set(settings)}"
    moments = (0.0, 0.0, 0.0)
    for batch, std, scaled in zip(
        inputs["score_batches"], outputs["running_std"], outputs["scaled_scores"], strict=True
    ):
        rewards = _tensor(batch) if limit is None else _tensor(batch).clamp(-limit, limit)
        moments = add_to_moments(moments, rewards)
        found = running_std(moments)
        if std is None or float(std) < 1e-4:  # one value, or equal ones, have no deviation to divide by
            assert found == (1.0 if moments[0] < 2 else 1e-4)
            continue
        _close(torch.tensor(found, dtype=torch.float64), std, "running std")
        _close(rewards / found, scaled, "scaled scores")
