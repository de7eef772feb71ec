"""Dr. MAS: the authors' grouping by prompt and agent, and the trajectory baseline that they compare with."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import label_ids
from trl_ext_plugins.dr_mas import agent_advantages, trajectory_advantages

KNOWN = {"scale_by_std", "eps", "ddof"}


def compare(case: dict[str, Any]) -> None:
    rows, outputs, settings = case["inputs"]["rows"], case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    assert settings["ddof"] == 1, "the plugin divides by n - 1 only"
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    prompts, trajectories, agents = (
        label_ids([row[name] for row in rows]) for name in ("prompt", "trajectory", "agent")
    )
    # numbers of the authors' code keep the reward of a single row
    options = {"eps": settings["eps"], "scale": settings["scale_by_std"], "alone": "reward"}
    _close(agent_advantages(rewards, prompts, agents, **options), outputs["advantages"], "advantages")
    baseline = trajectory_advantages(rewards, prompts, trajectories, **options)
    _close(baseline, outputs["advantages_trajectory_grpo"], "advantages_trajectory_grpo")


def _close(ours: torch.Tensor, expected: list[float], what: str) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=0, msg=lambda text: f"{what}: {text}")
