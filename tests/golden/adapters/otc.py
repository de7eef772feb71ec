"""OTC: the paper's equations in plain floats (kinds `ppo` and `grpo`); its authors published no code."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_plugins.otc import falling_coefficient, fewest_calls, scale_rewards, tool_coefficient

KNOWN = {"c", "alpha"}


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    assert not settings.keys() - KNOWN, f"the adapter does not know {settings.keys() - KNOWN}"
    calls, c = torch.tensor(inputs["tool_calls"]), settings["c"]
    if case["kind"] == "ppo":
        coefficient = falling_coefficient(calls, c)
    else:
        assert case["kind"] == "grpo", f"unknown kind {case['kind']!r}"
        size = inputs["num_generations"]
        group_ids = torch.arange(len(calls)) // size
        now = fewest_calls(calls, _tensor(inputs["correct"]) > 0, group_ids)
        before = _solved(inputs.get("n_prev") or [None] * (len(calls) // size))
        n = torch.fmin(before[group_ids], now)
        _close(n[::size], _solved(outputs["n"]), 0.0, 0.0, "n")
        coefficient = tool_coefficient(calls, n, c)
    _close(coefficient, _tensor(outputs["r_tool"]), 1e-9, 0.0, "r_tool")
    rewards, alpha, expected = _tensor(inputs["r_phi"]), settings.get("alpha", 1.0), _tensor(outputs["reward"])
    for dtype, limit, relative in ((torch.float64, 1e-9, 1e-12), (torch.float32, 1e-6, 1e-6)):
        ours = scale_rewards(rewards.to(dtype), coefficient, alpha)
        assert ours.dtype == dtype
        _close(ours, expected, limit, relative, f"reward, {dtype}")


def _tensor(values: list[Any]) -> torch.Tensor:
    """Returns (N,) float64; null is NaN."""
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _solved(values: list[Any]) -> torch.Tensor:
    """Returns fewest calls; a prompt that was never solved is null, or infinitely many."""
    numbers = _tensor(values)
    return torch.where(torch.isinf(numbers), torch.nan, numbers)


def _close(ours: torch.Tensor, expected: torch.Tensor, limit: float, relative: float, what: str) -> None:
    torch.testing.assert_close(
        ours.double(), expected, atol=limit, rtol=relative, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
