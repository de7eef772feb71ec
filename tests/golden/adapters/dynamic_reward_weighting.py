"""Dynamic reward weighting: the authors' hypervolume of a point, and their update of weights on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl_ext_plugins.dynamic_weights.maths import contribution, influences, moved_weights, multiplier


def compare(case: dict[str, Any]) -> None:
    {"hypervolume": by_hypervolume, "gradient": by_gradient}[case["variant"]](case)


def by_hypervolume(case: dict[str, Any]) -> None:
    inputs, outputs = case["inputs"], case["outputs"]
    assert not case["hyperparameters"]
    points = [*inputs["buffer"], inputs["current"]]
    reference, *archive, current = (upwards(point, inputs["maximize"]) for point in points)
    gain = contribution(current, archive, reference)
    assert gain == pytest.approx(outputs["hv_contribution"], abs=1e-9, rel=1e-9)
    assert multiplier(gain) == pytest.approx(outputs["meta_reward"], abs=1e-9)


def upwards(point: list[float], maximize: list[bool]) -> list[float]:
    return [value if up else -value for value, up in zip(point, maximize, strict=True)]


def by_gradient(case: dict[str, Any]) -> None:
    inputs, outputs, settings = case["inputs"], case["outputs"], case["hyperparameters"]
    assert settings.keys() == {"learning_rate", "regularization"}
    gradients = torch.tensor(inputs["gradients"], dtype=torch.float64)
    influence = influences(gradients)
    assert influence.tolist() == pytest.approx(outputs["influence"], abs=1e-9, rel=1e-9)
    rate = settings["learning_rate"] / settings["regularization"]
    weights = moved_weights(torch.tensor(inputs["weights"], dtype=torch.float64), influence, rate)
    assert weights.tolist() == pytest.approx(outputs["new_weights"], abs=1e-9)
