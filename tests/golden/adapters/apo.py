"""APO: the forms of its extrapolation, the closed form, and changes by adapters; float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trl_ext_plugins.apo.maths import (
    coefficients,
    extrapolate,
    extrapolate_lora,
    extrapolate_policy,
    lora_change,
    momentum,
)

LIMIT = 1e-10


def compare(case: dict[str, Any]) -> None:
    settings = case["hyperparameters"]
    assert not settings.keys() - {"kind", "alpha", "scaling", "betas"}, settings
    KINDS[settings["kind"]](settings, {k: _tensors(v) for k, v in case["inputs"].items()}, case["outputs"])


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensors(entry) for name, entry in value.items()}
    return _tensor(value)


def _tensor(values: Any) -> torch.Tensor:
    """Makes a float64 tensor of nested lists; null is NaN, and the texts `inf` and `-inf` are infinite."""
    if isinstance(values, list):
        return torch.stack([_tensor(value) for value in values]) if values else torch.zeros(0, dtype=torch.float64)
    return torch.tensor(math.nan if values is None else float(values), dtype=torch.float64)


def _close(found: torch.Tensor, expected: Any, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), _tensor(expected), atol=LIMIT, rtol=LIMIT, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


def _parameters(settings: Any, inputs: Any, outputs: Any) -> None:
    if not all(torch.isfinite(value).all() for value in inputs["hat_new"].values()):
        with pytest.raises(ValueError, match="not finite"):  # a broken round must not go on
            extrapolate(inputs["hat_new"], inputs["hat_prev"], settings["alpha"])
        return
    found = extrapolate(inputs["hat_new"], inputs["hat_prev"], settings["alpha"])
    assert found.keys() == outputs["next_start"].keys()
    for name, value in found.items():
        _close(value, outputs["next_start"][name], name)


def _policy(settings: Any, inputs: Any, outputs: Any) -> None:
    found, log_z = extrapolate_policy(inputs["log_hat_new"], inputs["log_hat_prev"], settings["alpha"])
    _close(found, outputs["log_next"], "log_next")
    _close(log_z, outputs["log_partition"], "log_partition")
    shifted, _ = extrapolate_policy(inputs["log_hat_new"] + 3, inputs["log_hat_prev"] - 1, settings["alpha"])
    _close(shifted, outputs["log_next"], "a constant per prompt")


def _softmax_linear(settings: Any, inputs: Any, outputs: Any) -> None:
    new, previous = inputs["theta_new"], inputs["theta_prev"]
    theta = extrapolate({"theta": new}, {"theta": previous}, settings["alpha"])["theta"]
    _close(theta, outputs["theta_next"], "theta_next")
    logs = [(inputs["features"] @ value).log_softmax(0) for value in (new, previous)]
    for found in ((inputs["features"] @ theta).log_softmax(0), extrapolate_policy(*logs, settings["alpha"])[0]):
        _close(found, outputs["log_policy_next"], "log_policy_next")


def _sequence(settings: Any, inputs: Any, outputs: Any) -> None:
    alpha, updates = settings["alpha"], inputs["updates"]
    start = previous = wrong = inputs["theta_ref"]
    buffered, velocity = start, torch.zeros_like(start)
    for index, update in enumerate(updates):
        _close(start, outputs["starts"][index], "start")
        _close(buffered, outputs["starts"][index], "start by the buffer")
        _close(wrong, outputs["starts_with_wrong_anchor"][index], "wrong anchor")
        hat = start + update
        _close(hat, outputs["hats"][index], "hat")
        weights = _tensor(coefficients(alpha, index + 1)).view(-1, *[1] * start.dim())  # theta may be a scalar
        _close(inputs["theta_ref"] + (weights * updates[: index + 1]).sum(0), outputs["hats"][index], "closed form")
        buffered, velocity = momentum(buffered, buffered + update, velocity, alpha)
        wrong = extrapolate({"": wrong + update}, {"": wrong}, alpha)[""]
        start, previous = extrapolate({"": hat}, {"": previous}, alpha)[""], hat
    _close(start, outputs["starts"][-1], "last start")
    _close(buffered, outputs["starts"][-1], "last start by the buffer")
    _close(wrong, outputs["starts_with_wrong_anchor"][-1], "last wrong anchor")
    _close(previous, outputs["released"], "released")
    assert len(outputs["starts"]) == len(updates) + 1


def _tabular(settings: Any, inputs: Any, outputs: Any) -> None:
    alpha, betas, rewards = settings["alpha"], settings["betas"], inputs["rewards"]
    start = previous = plain = inputs["log_ref"]
    for index, beta in enumerate(betas):
        _close(start, outputs["log_starts"][index], "log_start")
        hat = (start + rewards[index] / beta).log_softmax(-1)
        plain = (plain + rewards[index] / beta).log_softmax(-1)
        _close(hat, outputs["log_hats"][index], "log_hat")
        for log_probabilities, name in ((hat, "expected_reward"), (plain, "expected_reward_alpha0")):
            _close((log_probabilities.exp() * rewards[0]).sum(-1).mean(), outputs[name][index], name)
        if outputs.get("reward_coefficients"):  # where beta is constant
            found = _tensor(coefficients(alpha, index + 1))
            _close(found, outputs["reward_coefficients"][index], "reward_coefficients")
            total = (found.view(-1, 1, 1) * rewards[: index + 1]).sum(0) / beta
            _close((inputs["log_ref"] + total).log_softmax(-1), outputs["log_hats"][index], "theorem 4.1")
        start, previous = extrapolate_policy(hat, previous, alpha)[0], hat
    _close(start, outputs["log_starts"][-1], "last log_start")


def _lora(settings: Any, inputs: Any, outputs: Any) -> None:
    alpha, scaling, base = settings["alpha"], settings["scaling"], inputs["W0"]
    new, previous = ((inputs[f"lora_A_{name}"], inputs[f"lora_B_{name}"]) for name in ("new", "prev"))
    change = lora_change(*extrapolate_lora(new, previous, alpha), scaling)
    _close(change, outputs["delta_next"], "delta_next")
    assert torch.linalg.matrix_rank(change) <= outputs["rank_bound"] == len(new[0]) + len(previous[0])
    merged = [{"w": base + lora_change(*pair, scaling)} for pair in (new, previous)]
    _close(extrapolate(*merged, alpha)["w"], outputs["weight_next"], "weight_next")
    factors = [extrapolate({"": a}, {"": b}, alpha)[""] for a, b in zip(new, previous, strict=True)]
    _close(lora_change(*factors, scaling), outputs["factorwise_delta"], "factorwise_delta")


KINDS = {
    "parameters": _parameters,
    "policy": _policy,
    "softmax_linear": _softmax_linear,
    "sequence": _sequence,
    "tabular": _tabular,
    "lora": _lora,
}
