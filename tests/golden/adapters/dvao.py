"""DVAO: the published formula, computed by another implementation; no code of the authors was found."""

from __future__ import annotations

import math
from typing import Any

import torch

from trl_ext_hooks.toolkit.groups import group_normalize, group_stats
from trl_ext_plugins.dvao import dvao_advantages, spread_shares

KNOWN = {"eps", "ddof"}


def compare(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - KNOWN
    assert not unknown, f"the adapter does not know {unknown}"
    assert settings["ddof"] == 1, "the plugin divides by n - 1 only"
    rewards, weights = _tensor(inputs["rewards_per_func"]), _tensor(inputs["reward_weights"])
    size, eps = inputs["num_generations"], settings["eps"]
    group_ids = torch.arange(len(rewards)) // size
    stats = group_stats(rewards, group_ids)
    _close(stats.mean[::size], outputs["group_mean"], "group_mean")
    _close(stats.std[::size], outputs["group_std"], "group_std")
    _close(spread_shares(rewards, weights, group_ids, eps=eps)[::size], outputs["weights"], "weights")
    ours = dvao_advantages(rewards, weights, group_ids, eps=eps)
    _close(ours, outputs["advantages"], "advantages")
    single = dvao_advantages(rewards.float(), weights.float(), group_ids, eps=eps)
    assert single.dtype == torch.float32
    _close(single, outputs["advantages"], "advantages in float32", 1e-4)
    if "advantages_sum_then_normalise" in outputs:
        plain = group_normalize((rewards * weights).sum(1), group_ids, eps=eps)
        _close(plain, outputs["advantages_sum_then_normalise"], "advantages_sum_then_normalise")
    if "advantages_normalise_then_sum" in outputs:
        share = weights / weights.sum()
        fixed = (group_normalize(rewards, group_ids, eps=eps) * share).sum(1)
        _close(fixed, outputs["advantages_normalise_then_sum"], "advantages_normalise_then_sum")


def _tensor(values: list[Any]) -> torch.Tensor:
    """Returns a float64 tensor of a list, or of a list of lists; null is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float64)


def _close(ours: torch.Tensor, expected: list[Any], what: str, limit: float = 1e-6) -> None:
    torch.testing.assert_close(
        ours.double(), _tensor(expected), atol=limit, rtol=0, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
