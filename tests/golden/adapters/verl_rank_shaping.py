"""VERL rank shaping: the authors' functions of the ranks, and their controller on scalars."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_plugins.verl_rank import effective_rank, moved, prefix_ranks, rank_changes, rank_signal, shaped

KNOWN = {"stride", "gain", "kappa", "ema_alpha", "eps", "clamp"}
MEASURES = ("er", "erv", "era")


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    measures = torch.stack([measured(torch.tensor(row), settings["stride"]) for row in inputs["hidden_states"]])
    for name, column in zip(MEASURES, measures.T, strict=True):
        close(column, outputs[name], name)
    averages = torch.tensor([inputs["baselines"][name] for name in MEASURES], dtype=torch.float64)
    deviation = {"clamp": settings["clamp"], "eps": settings["eps"]}
    explore, signal = rank_signal(measures, averages, gain=settings["gain"], **deviation)
    # small averages magnify the float32 of the authors' singular values
    close(explore, outputs["beta"], "beta", atol=1e-4)
    close(signal, outputs["phi"], "phi", atol=1e-4)
    advantages = torch.tensor(inputs["advantages"], dtype=torch.float64)
    close(
        shaped(advantages, signal, kappa=settings["kappa"]),
        outputs["shaped_advantages"],
        "shaped_advantages",
        atol=1e-4,
    )
    averages_after = moved(averages.tolist(), measures, settings["ema_alpha"])
    close(torch.tensor(averages_after), [outputs["baselines_after"][name] for name in MEASURES], "baselines_after")


def measured(states: torch.Tensor, stride: int) -> torch.Tensor:
    """Returns rank, velocity and acceleration of one completion."""
    return torch.stack([effective_rank(states), *rank_changes(prefix_ranks(states, stride))])


def close(ours: torch.Tensor, expected: list[float], what: str, atol: float = 1e-5) -> None:
    torch.testing.assert_close(
        ours.double(),
        torch.tensor(expected, dtype=torch.float64),
        atol=atol,
        rtol=1e-4,
        msg=lambda text: f"{what}: {text}",
    )
