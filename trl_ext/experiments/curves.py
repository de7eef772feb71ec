"""The curves of a comparison as numbers: what the picture and the page draw."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .measures import series
from .recipe import Recipe
from .results import Runs
from .stats import band

POINTS = 150
"""Longer curves are averaged over as many neighbouring values as it takes."""
COLORS = ("#6b7280", "#2563b0", "#d9641e", "#1f8a63", "#8b52b3", "#a8841a", "#c23b5a", "#16869c")
"""One per arm; the first arm is grey, as it is what the others are compared with."""

_SHOWN = (r"rewards/[^/]+/mean", r"reward", r"rewards/(accuracies|margins)", r"completions/mean_length")
"""What is drawn besides the metrics of the recipe, in this order."""


def names(recipe: Recipe, runs: Runs) -> list[str]:
    """What is drawn: the metrics of the recipe, then rewards and length."""
    logged = {name for run in runs.values() for entry in run["history"] for name in entry}
    chosen = [metric.name for metric in recipe.metrics]
    others = [name for shown in _SHOWN for name in sorted(logged) if re.fullmatch(shown, name)]
    return list(dict.fromkeys([*chosen, *others]))


def collect(recipe: Recipe, runs: Runs) -> dict[str, dict[str, dict[str, Any]]]:
    """Metric -> arm -> `steps`, `mean`, `low`, `high` over finished runs, and `runs` by seed.

    `low` and `high` are missing where there is one run. Arms without values are left out.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names(recipe, runs):
        for arm in recipe.arms:
            curves = {}
            for seed in recipe.seeds:
                run = runs[arm.name, seed]
                steps, values = series(run["history"], name)
                if run["status"] == "finished" and values:
                    curves[seed] = dict(zip(steps, values, strict=True))
            if curves:
                found.setdefault(name, {})[arm.name] = _arm(curves)
    return found


def _arm(curves: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    width = max(1, math.ceil(len(steps) / POINTS))
    bins = [steps[start : start + width] for start in range(0, len(steps), width)]
    thinned = {seed: [sum(curve[s] for s in bin) / len(bin) for bin in bins] for seed, curve in curves.items()}
    content: dict[str, Any] = {"steps": [bin[-1] for bin in bins]}
    if len(thinned) > 1:
        mean, low, high = band(list(thinned.values()))
        content |= {"mean": _round(mean), "low": _round(low), "high": _round(high)}
    else:
        content["mean"] = _round(next(iter(thinned.values())))
    return content | {"runs": {str(seed): _round(values) for seed, values in thinned.items()}}


def _round(values: Sequence[float] | Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def limits(arms: Mapping[str, Mapping[str, Any]], level: float | None = None) -> tuple[float, float]:
    """The range of values that a panel shows: 0 to 1 for shares, else what there is with some room."""
    values = [v for arm in arms.values() for key in ("mean", "low", "high") for v in arm.get(key, [])]
    values += [] if level is None else [level]
    low, high = min(values), max(values)
    if low >= 0 and high <= 1 and high > 0.3:
        return 0.0, 1.0
    room = 0.06 * (high - low or abs(high) or 1.0)
    return low - room, high + room


def levels(found: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> the level that it is to reach, where the recipe asks for the steps to one."""
    return {metric["name"]: metric["level"] for metric in found["metrics"] if metric["level"] is not None}
