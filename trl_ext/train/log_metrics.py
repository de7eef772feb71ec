"""Metrics of a log entry that lines, tables and pictures show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OF_PAIRS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
"""Shown metrics of DPO, which has no reward functions."""


def shown(logs: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Returns the few metrics of a log entry that are shown, by short label.

    Args:
        logs: A log entry of TRL.
        prefix: `eval_` for evaluations.
    """
    start, end = f"{prefix}rewards/", "/mean"
    names = [key[len(start) : -len(end)] for key in logs if key.startswith(start) and key.endswith(end)]
    keys = {f"{start}{name}{end}": name for name in names}
    if names:
        keys |= {f"{prefix}reward": "total reward", f"{prefix}completions/mean_length": "length"}
    else:
        keys |= {f"{prefix}{key}": label for key, label in _OF_PAIRS.items()}
    return {label: float(logs[key]) for key, label in keys.items() if logs.get(key) is not None}


def is_evaluation(logs: Mapping[str, Any]) -> bool:
    """Returns whether a log entry comes from an evaluation."""
    return "eval_loss" in logs or "eval_reward" in logs


def is_training(logs: Mapping[str, Any]) -> bool:
    """Returns whether a log entry comes from a training step."""
    return "loss" in logs
