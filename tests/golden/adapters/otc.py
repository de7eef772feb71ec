"""OTC: the paper's equations in plain floats (kinds `ppo` and `grpo`); its authors published no code."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_plugins.otc import falling_coefficient, fewest_calls, scale_rewards, tool_coefficient

LIMITS = ((torch.float64, 1e-9), (torch.float32, 1e-6))


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    assert settings.keys() == {"c", "alpha"}, f"the adapter does not know {settings.keys() - {'c', 'alpha'}}"
    calls = torch.tensor(inputs["tool_calls"])
    if case["kind"] == "ppo":
        coefficient = falling_coefficient(calls, settings["c"])
    else:
        assert case["kind"] == "grpo", f"unknown kind {case['kind']!r}"
        size = inputs["num_generations"]
        group_ids = torch.arange(len(calls)) // size
        now = fewest_calls(calls, torch.tensor(inputs["correct"]).bool(), group_ids)
        n = torch.fmin(_numbers(inputs["n_prev"])[group_ids], now)
        _close(n[::size], _numbers(outputs["n"]), 0.0, "n")
        coefficient = tool_coefficient(calls, n, settings["c"])
    _close(coefficient, _numbers(outputs["r_tool"]), 1e-9, "r_tool")
    for dtype, limit in LIMITS:
        found = scale_rewards(_numbers(inputs["r_phi"]).to(dtype), coefficient, settings["alpha"])
        assert found.dtype == dtype
        _close(found, _numbers(outputs["reward"]), limit, f"reward, {dtype}")


def _numbers(values: list[Any]) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _close(found: torch.Tensor, expected: torch.Tensor, limit: float, what: str) -> None:
    torch.testing.assert_close(
        found.double(), expected, atol=limit, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
