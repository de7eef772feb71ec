"""Constrained RLHF: the authors' multipliers, mixture and dual update, step after step."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_plugins.constrained.maths import Form, dual_step, mixed_advantages, multipliers, standardized

KNOWN = {"squash", "equality", "lagrange_lr", "momentum", "max_grad_norm", "normalize_advantage"}


def compare(case: dict[str, Any]) -> None:
    inputs, settings = case["inputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    form: Form = ("equality" if settings["equality"] else "inequality") if settings["squash"] else "unsquashed"
    mu, thresholds = _tensor(inputs["dual_init"]), _tensor(inputs["thresholds"])
    velocity, trace = torch.zeros_like(mu), case["outputs"]["trace"]
    # without squashing the multipliers are the dual variables themselves, and some traces hold those of the end in
    # every step; there the mixed advantages say which ones were used
    of_the_end = form == "unsquashed" and all(entry["multipliers"] == trace[-1]["dual_after"] for entry in trace)
    rounds = zip(inputs["constraint_advantages"], inputs["kl_advantages"], inputs["rewards"], strict=True)
    for number, (expected, (constrained, objective, rewards)) in enumerate(zip(trace, rounds, strict=True)):
        step = f"step {number}"
        parts = _tensor(objective), _tensor(constrained)
        if settings["normalize_advantage"]:
            parts = standardized(parts[0]), standardized(parts[1])
        weights = multipliers(mu, form)
        if not of_the_end:
            _close(weights, expected["multipliers"], f"{step}, multipliers")
        _close(mixed_advantages(*parts, weights, form), expected["mixed_advantages"], f"{step}, mixed_advantages")
        violations = _tensor(rewards).nanmean(dim=0) - thresholds
        _close(violations, expected["violations"], f"{step}, violations")
        mu, velocity = dual_step(
            mu,
            velocity,
            violations,
            form,
            learning_rate=settings["lagrange_lr"],
            momentum=settings["momentum"],
            max_grad_norm=settings["max_grad_norm"],
        )
        _close(mu, expected["dual_after"], f"{step}, dual_after")
        if not of_the_end and "multipliers_after" in expected:
            _close(multipliers(mu, form), expected["multipliers_after"], f"{step}, multipliers_after")


def _tensor(values: list[Any]) -> torch.Tensor:
    """Returns a float64 tensor of numbers or of lists; null is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _close(ours: torch.Tensor, expected: list[float], what: str) -> None:
    torch.testing.assert_close(ours, _tensor(expected), atol=1e-9, rtol=0, msg=lambda text: f"{what}: {text}")
