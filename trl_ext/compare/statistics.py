"""Means over seeds with bootstrap confidence intervals, and what may be concluded from them. Numbers in, numbers out.

Arms are paired by seed: run `i` of both had the same data order and the same first completions, so differences are
resampled, not the arms one by one.

A percentile interval is too narrow for few values. Its quantiles are therefore widened as Hesterberg proposes (What
Teachers Should Know about the Bootstrap, arXiv 1411.5279, the "expanded percentile interval"): for level `1 - a`
the quantile `a / 2` becomes `Phi(-sqrt(n / (n - 1)) * t)`, with `t` the `1 - a / 2` quantile of Student's distribution
with `n - 1` degrees of freedom. An interval never leaves the range of the data, so below 6 seeds chance alone gives a
verdict more often than in 5 % of cases: see `chance`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from .measures import Direction

Verdict = Literal["better", "worse", "not distinguishable"]
Array = npt.NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean (or a ratio of means) with the ends of its interval."""

    mean: float
    low: float
    high: float


def estimate(values: Sequence[float] | Array) -> Estimate:
    """Returns the mean over seeds and its interval.

    Args:
        values: (n,) one number per seed, n >= 2.

    Raises:
        ValueError: There are fewer than two values, or one is not finite.
    """
    array = _checked(values)
    return _interval(float(array.mean()), resampled_means(array[:, None])[:, 0], len(array))


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Returns `mean(ours - theirs)`, paired: both (n,), the same seeds in the same order."""
    return estimate(_checked(ours) - _paired(ours, theirs))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate | None:
    """Returns `mean(ours) / mean(theirs)`, paired, or None where a resampled denominator is 0 or less."""
    ours_n, theirs_n = _checked(ours), _paired(ours, theirs)
    means = resampled_means(np.stack([ours_n, theirs_n], axis=1))  # (R, 2)
    if theirs_n.mean() <= 0 or (means[:, 1] <= 0).any():
        return None
    return _interval(float(ours_n.mean() / theirs_n.mean()), means[:, 0] / means[:, 1], len(ours_n))


def verdict(change: Estimate, better: Direction) -> Verdict:
    """Says what a difference `ours - theirs` means for ours: nothing, if its interval holds 0."""
    if change.low <= 0 <= change.high:
        return "not distinguishable"
    return "better" if (change.low > 0) == (better == "higher") else "worse"


def apart(one: Estimate, other: Estimate) -> bool:
    """Says whether two intervals have no point in common. Stricter than a verdict, which uses the pairing."""
    return one.high < other.low or other.high < one.low


def chance(seeds: int) -> float:
    """Returns how often equal arms get a verdict because all their differences have one sign: `2 ** (1 - n)`."""
    return 2.0 ** (1 - seeds)


def band(curves: npt.ArrayLike, resamples: int = 2000) -> tuple[Array, Array, Array]:
    """Returns mean and interval at every step.

    Args:
        curves: (n, S) one curve per seed at the same S steps, n >= 2.
        resamples: Fewer than for numbers, as a picture shows no third digit.

    Returns:
        Means, lower ends and upper ends, (S,) each.
    """
    array = np.asarray(curves, dtype=np.float64)
    if len(array) < 2:
        raise ValueError(f"an interval needs at least two seeds, got {len(array)}")
    tail = _tail(len(array))
    low, high = np.quantile(resampled_means(array, resamples), [tail, 1 - tail], axis=0)
    return array.mean(axis=0), low, high


def resampled_means(values: Array, resamples: int = RESAMPLES) -> Array:
    """Returns means of bootstrap samples: (n, S) -> (R, S). The samples are always the same, so results repeat."""
    n = len(values)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=resamples)  # (R, n): how often each seed
    return drawn @ values / n


def _interval(center: float, samples: Array, n: int) -> Estimate:
    tail = _tail(n)
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Estimate(center, float(low), float(high))


def _tail(n: int) -> float:
    """Returns the quantile of the lower end for n seeds."""
    normal = NormalDist()
    z = normal.inv_cdf((1 + LEVEL) / 2)
    f = n - 1
    # Student's quantile, expanded in 1 / f (Abramowitz and Stegun 26.7.5). For f < 3 it is far out in any case
    t = z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    return normal.cdf(-math.sqrt(n / f) * t)


def _checked(values: Sequence[float] | Array) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"an interval needs at least two seeds, got {array.size}")
    if not np.isfinite(array).all():
        raise ValueError(f"an interval needs finite numbers, got {array.tolist()}")
    return array


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> Array:
    if len(ours) != len(theirs):
        raise ValueError(f"arms are paired by seed, got {len(ours)} and {len(theirs)} values")
    return _checked(theirs)
