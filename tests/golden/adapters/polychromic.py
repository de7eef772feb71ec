"""Polychromic: scores of sets by enumeration, from another implementation; no code of the authors for this form."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import label_ids
from trl_ext_plugins.polychromic import polychromic_advantages, set_scores

KNOWN = {"set_size"}


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    rewards = torch.tensor([math.nan if r is None else float(r) for r in inputs["rewards"]], dtype=torch.float64)
    size = inputs["num_generations"]
    strategies = label_ids(inputs["strategy_labels"])
    scores = set_scores(rewards, strategies, torch.arange(len(rewards)) // size, settings["set_size"])
    _close(scores.all_sets[::size], outputs["mean_set_score"], "mean_set_score")
    _close(polychromic_advantages(rewards, scores), outputs["advantages"], "advantages")


def _close(ours: torch.Tensor, expected: list[float], what: str) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, wanted, atol=1e-9, rtol=0, msg=lambda text: f"{what}: {text}")
