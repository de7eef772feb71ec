"""The time that a comparison will take, from runs that have ended or from what the recipe states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .recipe import Recipe
from .runs import Run


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What runs are expected to take.

    Attributes:
        seconds: Arm -> seconds of a run. Empty where nothing is known.
        source: Where the numbers come from, in words.
    """

    seconds: Mapping[str, float]
    source: str

    def total(self, runs: Sequence[Run], at_once: int) -> float | None:
        """Returns the seconds that runs take, several at a time."""
        if not self.seconds or not runs:
            return None
        return sum(self.seconds[run.arm] for run in runs) / min(at_once, len(runs))


def estimate(recipe: Recipe, ended: Mapping[Run, Mapping[str, Any]]) -> Estimate:
    """Returns what a run of each arm will take.

    Args:
        recipe: Which may state the seconds of a run.
        ended: The records of runs that have ended before. Those of this machine count more than the recipe.
    """
    seconds: dict[str, list[float]] = {}
    for run, record in ended.items():
        if record["status"] == "finished":
            seconds.setdefault(run.arm, []).append(record["seconds"])
    means = {arm: sum(values) / len(values) for arm, values in seconds.items()}
    count = sum(map(len, seconds.values()))
    if means:
        source = f"the {count} runs that have ended" if count > 1 else "the run that has ended"
    elif recipe.seconds_per_run is not None:
        source = f"the {recipe.seconds_per_run:g} s that the recipe states for a run"
    else:
        return Estimate({}, "the recipe states no `seconds_per_run`, and no run has ended yet")
    others = sum(means.values()) / len(means) if means else recipe.seconds_per_run
    assert others is not None
    return Estimate({arm: means.get(arm, others) for arm in recipe.arms}, source)


def roughly(seconds: float) -> str:
    """Writes a duration without more digits than it deserves: `40 s`, `9 min`, `1.5 h`."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    if seconds < 100 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
