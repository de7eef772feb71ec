"""TGDPO: the authors' loss on per-token log-probabilities, and from logits; float64."""

from __future__ import annotations

import math
import types
from typing import Any

import torch

from trl_ext_hooks import ScoredPairs
from trl_ext_plugins.tgdpo import GUIDE, TGDPO, guidance_factors, guided_margin, implicit_rewards

LIMIT = 1e-9


def compare(case: dict[str, Any]) -> None:
    settings, inputs, expected = case["hyperparameters"], case["inputs"], case["outputs"]
    unknown = settings.keys() - {"alpha", "beta"}
    assert not unknown, f"the adapter does not know {unknown}"
    if "policy_logits" in inputs:
        _logits(settings, inputs, expected)
        return
    sides = {name: _stack(inputs, name) for name in ("policy", "ref", "guide")}
    mask = _tensor(inputs["chosen_mask"] + inputs["rejected_mask"]) != 0
    policy = sides["policy"].masked_fill(~mask, 0).requires_grad_()
    reference, guide = (sides[name].masked_fill(~mask, 0) for name in ("ref", "guide"))
    beta, alpha = settings["beta"], settings["alpha"]

    factors = guidance_factors(implicit_rewards(guide, reference, beta), alpha)
    _close(factors, expected["token_weight_chosen"] + expected["token_weight_rejected"], "token_weight")
    margin = beta * guided_margin(policy, reference, factors)
    _close(margin, expected["margin"], "margin")
    _outputs(policy, reference, beta, margin, expected)
    (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin).mean(), policy)
    # the official code masks inside its sums: no gradient outside the completions
    _close(
        gradient.masked_fill(~mask, 0), expected["grad_policy_chosen"] + expected["grad_policy_rejected"], "gradient"
    )
    _hook(policy.detach(), reference, guide, mask, settings, margin.detach())


def _hook(
    policy: torch.Tensor,
    reference: torch.Tensor,
    guide: torch.Tensor,
    mask: torch.Tensor,
    settings: dict[str, Any],
    margin: torch.Tensor,
) -> None:
    """The hook, from which TRL sums: its weighted log-probabilities give the same margin."""
    width = mask.size(1) + 1
    batch = {"completion_mask": torch.cat([torch.zeros(len(mask), 1), mask], dim=1).view(-1, width)}
    trainer: Any = types.SimpleNamespace(args=types.SimpleNamespace(beta=settings["beta"]))
    pairs = ScoredPairs("train", 0, trainer, batch, [{}] * (len(mask) // 2), {GUIDE: guide}, policy, reference)
    out = TGDPO(TGDPO.Options(alpha=settings["alpha"], guide="any")).pair_logps(pairs=pairs)
    chosen, rejected = (out.per_token_logps.sum(1) - out.ref_per_token_logps.sum(1)).chunk(2)
    torch.testing.assert_close(settings["beta"] * (chosen - rejected), margin, atol=LIMIT, rtol=1e-12, equal_nan=True)


def _logits(settings: dict[str, Any], inputs: dict[str, Any], expected: dict[str, Any]) -> None:
    """(2B, S, V) logits; the logits at s - 1 score label s."""
    labels = torch.tensor(inputs["labels"])[:, 1:]
    mask = labels != -100

    def logps(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        logits = _tensor(inputs[name]).requires_grad_()
        found = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
        return logits, found.masked_fill(~mask, 0)

    leaf, policy = logps("policy_logits")
    _, reference = logps("ref_logits")
    _, guide = logps("guide_logits")
    factors = guidance_factors(implicit_rewards(guide, reference, settings["beta"]), settings["alpha"])
    margin = settings["beta"] * guided_margin(policy, reference.detach(), factors)
    _outputs(policy, reference.detach(), settings["beta"], margin, expected)
    (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(margin).mean(), leaf)
    _close(gradient, expected["grad_policy_logits"], "gradient")
    assert mask.sum(1).tolist() == torch.tensor(expected["completion_lengths"]).flatten().tolist()


def _outputs(
    policy: torch.Tensor, reference: torch.Tensor, beta: float, margin: torch.Tensor, expected: dict[str, Any]
) -> None:
    losses = -torch.nn.functional.logsigmoid(margin)
    _close(losses, expected["losses"], "losses")
    _close(losses.mean(), expected["loss"], "loss")
    chosen, rejected = (beta * (policy - reference).sum(1)).chunk(2)
    _close(chosen, expected["chosen_rewards_sum"], "chosen_rewards_sum")
    _close(rejected, expected["rejected_rewards_sum"], "rejected_rewards_sum")


def _stack(inputs: dict[str, Any], name: str) -> torch.Tensor:
    return _tensor(inputs[f"{name}_chosen_logps"] + inputs[f"{name}_rejected_logps"])


def _tensor(values: Any) -> torch.Tensor:
    """Makes a float64 tensor of nested lists; null is NaN, and the texts `inf` and `-inf` are infinite."""
    if isinstance(values, list):
        return torch.stack([_tensor(value) for value in values]) if values else torch.zeros(0, dtype=torch.float64)
    return torch.tensor(math.nan if values is None else float(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), _tensor(expected), atol=LIMIT, rtol=LIMIT, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
