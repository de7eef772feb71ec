"""Reward-model ensembles: both codes of the authors. Ours divides the variance by K, as the paper does."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_plugins.rm_ensemble import combine, disagreement


def compare(case: dict[str, Any]) -> None:
    outputs, settings = case["outputs"], case["hyperparameters"]
    unknown = settings.keys() - {"uwo_coefficient"}
    assert not unknown, f"the adapter does not know {unknown}"
    scores, coefficient = torch.tensor(case["inputs"]["scores"], dtype=torch.float64), settings["uwo_coefficient"]
    _close(combine(scores, "mean"), outputs["mean"], "mean")
    _close(combine(scores, "wco"), outputs["wco"], "wco")
    _close(combine(scores, "uwo", coefficient), outputs["uwo_paper"], "uwo_paper")
    _close(disagreement(scores), outputs["variance_ddof0"], "variance_ddof0")
    models = len(scores)
    if models > 1:  # the PPO code divides by K - 1
        larger = combine(scores, "uwo", coefficient * models / (models - 1))
        _close(larger, outputs["uwo_official_ppo"], "uwo_official_ppo")
    else:
        assert outputs["uwo_official_ppo"] is None


def _close(ours: torch.Tensor, expected: list[float], what: str) -> None:
    torch.testing.assert_close(
        ours, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0, msg=lambda text: f"{what}: {text}"
    )
