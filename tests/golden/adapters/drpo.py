"""DRPO and DisCO: the authors' losses, one whole batch per case.

Their soft-max term is printed as S / detach(S), which changes the value and no gradient. Ours is compared with the loss
that is meant.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_plugins.drpo import DRPO, DisCO
from trl_ext_plugins.drpo.maths import (
    completion_scores,
    constraint_factor,
    contrast,
    kl_values,
    length_logits,
)

LIMIT = 1e-8
KNOWN = {"variant", "delta", "beta", "tau", "kl_type", "lambda"}


def compare(case: dict[str, Any]) -> None:
    found, expected = ours(case, torch.float64), case["outputs"]
    for name in ("loss", "kl", "scores", "grad_log_probs"):
        _close(found[name], expected[name], name)
    assert float(found["kl"] > case["hyperparameters"]["delta"]) == expected["constraint_active"]
    single = ours(case, torch.float32)["grad_log_probs"]
    largest = torch.tensor(expected["grad_log_probs"]).abs().max().item()
    _close(single.double(), expected["grad_log_probs"], "grad_log_probs in float32", 1e-4 * max(largest, 1e-9))


def ours(case: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    inputs, settings = case["inputs"], case["hyperparameters"]
    assert not settings.keys() - KNOWN, f"the adapter does not know {settings.keys() - KNOWN}"
    logps, old, mask = (torch.tensor(inputs[name], dtype=dtype) for name in ("log_probs", "old_log_probs", "mask"))
    logps.requires_grad_()
    rewards = torch.tensor([math.nan if value is None else value for value in inputs["rewards"]], dtype=torch.float64)
    score, tau, temperature = _variant(settings)
    # what the plugin computes of a step: in double precision, whatever the policy computes in
    scores = completion_scores(logps.double(), old.double(), mask, score)
    logits = length_logits(mask.sum(1), inputs["max_completion_length"], temperature)
    result = contrast(scores.detach(), rewards, torch.tensor(inputs["group_ids"]), logits, tau)
    kl = (kl_values(logps.double(), old.double(), settings["kl_type"]) * mask).sum() / mask.sum()
    factor = constraint_factor(kl.detach(), settings["delta"], settings["beta"])
    (gradient,) = torch.autograd.grad(factor * kl - (result.slopes * scores).sum(), logps)
    loss = factor * kl - result.value
    return {"loss": loss.detach(), "kl": kl.detach(), "scores": scores.detach(), "grad_log_probs": gradient}


def _variant(settings: dict[str, Any]) -> tuple[Any, float, float]:
    """Returns score, tau and lambda of a case, as the plugin of that name makes them of its options."""
    name, limits = settings["variant"], {"kl_limit": settings["delta"], "kl_penalty": settings["beta"]}
    limits |= {"kl_estimate": settings["kl_type"]}
    plugin: Any
    if name == "drpo":
        plugin = DRPO(DRPO.Options(length_temperature=settings["lambda"], tau=settings["tau"], **limits))
    else:
        method, _, score = name.partition("_")
        assert method in ("disco", "discob"), f"unknown variant {name}"
        tau = {"negatives": "mean"} if method == "discob" else {"tau": settings["tau"]}
        plugin = DisCO(DisCO.Options(score=score, **tau, **limits))
    plugin.start()
    return plugin.score, plugin.tau, settings.get("lambda", math.inf)


def _close(found: torch.Tensor, expected: Any, what: str, limit: float = LIMIT) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), atol=limit, rtol=0, msg=lambda text: f"{what}: {text}"
    )
