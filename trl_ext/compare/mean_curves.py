"""The mean curves of a comparison with their bands, as numbers that the plots show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .measures import series
from .recipe import Recipe
from .runs import Records
from .statistics import band

POINTS = 150
"""Longer curves are averaged over as many neighbouring values as it takes."""

_SHOWN = (r"rewards/[^/]+/mean", r"reward", r"rewards/(accuracies|margins)", r"completions/mean_length")
"""What is drawn besides the metrics of the recipe, in this order."""


def names(recipe: Recipe, records: Records) -> list[str]:
    """Returns the metrics that are drawn: those of the recipe, then rewards and length."""
    logged = {name for record in records.values() for entry in record["history"] for name in entry}
    return list(dict.fromkeys([*(metric.name for metric in recipe.metrics), *shown(logged)]))


def shown(logged: Iterable[str]) -> list[str]:
    """Returns those of the logged metrics that are shown unasked."""
    names = sorted(logged)
    return [name for pattern in _SHOWN for name in names if re.fullmatch(pattern, name)]


def collect(recipe: Recipe, records: Records) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns metric -> arm -> `steps`, `mean`, `low`, `high` over finished runs, and `runs` by seed.

    `low` and `high` are missing where there is one run. Arms without values are left out.
    """
    collected: dict[str, dict[str, dict[str, Any]]] = {}
    for name in names(recipe, records):
        for arm in recipe.arms:
            curves = {}
            for seed in recipe.seeds:
                record = records[arm, seed]
                steps, values = series(record["history"], name)
                if record["status"] == "finished" and values:
                    curves[seed] = dict(zip(steps, values, strict=True))
            if curves:
                collected.setdefault(name, {})[arm] = mean_curve(curves)
    return collected


def mean_curve(curves: Mapping[int, Mapping[int, float]]) -> dict[str, Any]:
    """Returns the mean over seeds at the steps that all have, and its band.

    Args:
        curves: Seed -> step -> value.
    """
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
