"""Reg-GRPO: the published loss, computed by another implementation; no code of the authors could be read."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_normalize
from trl_ext_hooks.toolkit.losses import sequence_log_ratio
from trl_ext_plugins.reg_grpo import predicted_advantages, regression_losses

KNOWN = {"eps", "ddof", "std_floor", "reduction"}
LIMIT = 1e-7


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    eps, ddof, size = settings["eps"], settings["ddof"], inputs["num_generations"]
    logps, old, mask = (_tensor(inputs[name]) for name in ("log_probs", "old_log_probs", "mask"))
    logps.requires_grad_()
    group_ids = torch.arange(len(logps)) // size
    advantages = group_normalize(_tensor(inputs["rewards"]), group_ids, eps=eps, ddof=ddof)
    _close(advantages, outputs["target_advantages"], "target_advantages")
    rho = sequence_log_ratio(logps, old, mask, settings.get("reduction", "sum"))
    _close(rho, outputs["rho"], "rho")
    floor = settings.get("std_floor", 0.0)
    predicted = predicted_advantages(rho, group_ids, std_floor=floor, eps=eps, ddof=ddof)
    _close(predicted, outputs["predicted_advantages"], "predicted_advantages")
    loss = regression_losses(predicted, advantages, group_ids).sum() / (len(logps) // size)
    _close(loss, outputs["loss"], "loss")
    (gradient,) = torch.autograd.grad(loss, logps)
    _close(gradient, outputs["grad_log_probs"], "grad_log_probs")


def _tensor(values: Any) -> torch.Tensor:
    """Makes a float64 tensor of nested lists; null is NaN."""
    if isinstance(values, list):
        return torch.stack([_tensor(value) for value in values])
    return torch.tensor(math.nan if values is None else float(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), _tensor(expected), atol=LIMIT, rtol=LIMIT, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
