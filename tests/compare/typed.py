"""Recipes and records typed by hand: two arms, `plain` and `ours`, and a metric called `reward`."""

from __future__ import annotations

from typing import Any

from trl_ext.compare.recipe import Arm, Expectation, Metric, Recipe

SEEDS = (1, 2, 3, 4, 5, 6)
LOW, HIGH = [1.0, 1.2, 0.9, 1.1, 1.0, 0.8], [2.0, 2.3, 1.9, 2.2, 1.9, 1.7]


def recipe(*metrics: Metric, seeds: tuple[int, ...] = SEEDS) -> Recipe:
    arms = {"plain": Arm(), "ours": Arm(plugins={"gdpo": {}})}
    return Recipe("typed", "typed.yaml", {}, arms, seeds, metrics)


def metric(**changes: Any) -> Metric:
    content = {"name": "reward", "reduce": "mean", "better": "higher"} | changes
    return Metric.model_validate(content, context={"arms": ["plain", "ours"]})


def expect(claim: Any = "better", **more: Any) -> Expectation:
    return Expectation(arm="ours", against="plain", claim=claim, **more)


def record(*values: float, status: str = "finished", name: str = "reward") -> dict[str, Any]:
    history = [{"step": step, name: value} for step, value in enumerate(values, 1)]
    error = None if status == "finished" else "reason"
    return {"status": status, "error": error, "history": history, "steps": len(values), "seconds": 2.0}


def records(plain: list[Any], ours: list[Any], seeds: tuple[int, ...] = SEEDS) -> dict[tuple[str, int], dict[str, Any]]:
    """(arm, seed) -> record, of records or of single values."""
    return {
        (arm, seed): value if isinstance(value, dict) else record(value)
        for arm, values in {"plain": plain, "ours": ours}.items()
        for seed, value in zip(seeds, values, strict=True)
    }
