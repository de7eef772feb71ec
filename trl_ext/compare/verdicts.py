"""The verdicts of a comparison: numbers, differences and expectations from the records of all runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import statistics
from .measures import Value, series
from .recipe import Expectation, Metric, Recipe
from .runs import Records

_DECIDED = {**dict.fromkeys(("better", "worse", "higher", "lower"), "than"), "not distinguishable": "from"}
"""Verdicts that name the other arm -> the word between."""
Values = dict[str, dict[int, Value]]
"""Arm -> seed -> value of one metric, of finished runs."""


def summarize(recipe: Recipe, records: Records) -> dict[str, Any]:
    """Returns what the runs say about each metric, and whether that was expected."""
    metrics = [_metric(metric, recipe, records) for metric in recipe.metrics]
    notes = []
    if len(recipe.seeds) == 1:
        notes.append("one seed: there are no intervals and no verdicts. Give two seeds or more.")
    elif statistics.chance(len(recipe.seeds)) > 1 - statistics.LEVEL:
        notes.append(few_seeds(len(recipe.seeds)))
    summary = {
        "claim": recipe.claim,
        "arms": {arm: _arm(arm, recipe.seeds, records) for arm in recipe.arms},
        "metrics": metrics,
        "notes": notes,
        "complete": all(record["status"] == "finished" for record in records.values()),
        "met": all(entry["met"] for metric in metrics for entry in metric["expectations"]),
    }
    return summary | {"headline": headline(summary)}


def headline(content: Mapping[str, Any]) -> str:
    """Returns the title of a report: the claim if it was borne out, and otherwise what the runs say about one metric.

    A claim counts as borne out if there are expectations and all were met. Where a recipe says why one was not, so does
    the title.

    Args:
        content: As in `compare.json`.
    """
    expectations = [entry for metric in content["metrics"] for entry in metric["expectations"]]
    if content["claim"] and expectations and all(entry["met"] for entry in expectations):
        return str(content["claim"])
    if not content["metrics"]:
        return f"{', '.join(content['arms'])}: nothing to compare"
    metric = content["metrics"][0]
    by_verdict: dict[str, list[str]] = {}
    for pair in metric["comparisons"]:
        decided = pair["verdict"] in _DECIDED
        by_verdict.setdefault(f" {say(pair)}" if decided else f" against {pair['against']}: {say(pair)}", []).append(
            pair["arm"]
        )
    said = "; ".join(" and ".join(dict.fromkeys(arms)) + verdict for verdict, arms in by_verdict.items())
    missed = sum(entry["met"] is False for entry in expectations)
    unknown = sum(entry["met"] is None for entry in expectations)
    counts = [f"{missed} not met"] * bool(missed) + [f"{unknown} not judged"] * bool(unknown)
    remark = f"; {' and '.join(counts)} of {len(expectations)} expectations" if counts else ""
    reasons = [entry["reason"] for entry in expectations if entry["met"] is False and "reason" in entry]
    remark += f" ({'; '.join(reasons)})" if reasons else ""
    return f"{said} ({metric['name']}, {metric['measure']}){remark}"


def say(pair: Mapping[str, Any]) -> str:
    """Writes the verdict of a comparison with the arm that it is about."""
    verdict, against = str(pair["verdict"]), pair["against"]
    joint = _DECIDED.get(verdict)
    return f"{verdict} {joint} {against}" if joint else verdict


def as_stated(content: Mapping[str, Any]) -> bool:
    """Returns whether all expectations were met, apart from those that the recipe states as not met."""
    expectations = [entry for metric in content["metrics"] for entry in metric["expectations"]]
    return all(entry["met"] or "reason" in entry for entry in expectations)


def statement(expectation: Mapping[str, Any]) -> str:
    """Writes what the recipe says about an expectation that it states as not met, to follow the answer."""
    if "reason" not in expectation:
        return ""
    if expectation["met"]:
        return ", recorded as not met, but it is"
    return f", recorded as not met: {expectation['reason']}"


def few_seeds(seeds: int) -> str:
    """Says how often equal arms get a verdict by chance."""
    return (
        f"{seeds} seeds are few: arms that do not differ would get a verdict in {statistics.chance(seeds):.0%} of such "
        f"comparisons. From 6 seeds on it is less than 5%."
    )


def _arm(name: str, seeds: Sequence[int], records: Records) -> dict[str, Any]:
    """Returns how the runs of an arm ended."""
    failed = [
        {"seed": seed, "status": record["status"], "error": record["error"]}
        for seed in seeds
        if (record := records[name, seed])["status"] != "finished"
    ]
    seconds = [records[name, seed]["seconds"] for seed in seeds if records[name, seed]["status"] == "finished"]
    return {
        "finished": len(seeds) - len(failed),
        "failed": failed,
        "seconds_per_run": round(sum(seconds) / len(seconds), 1) if seconds else None,
    }


def _metric(metric: Metric, recipe: Recipe, records: Records) -> dict[str, Any]:
    """Returns values, estimates, comparisons and expectations of a metric."""
    arms = list(recipe.arms)
    values: Values = {arm: _values(metric, arm, recipe.seeds, records) for arm in arms}
    pairs = [(arm, arms[0]) for arm in arms[1:]]
    pairs += [(e.arm, e.against) for e in metric.expect if (e.arm, e.against) not in pairs]
    comparisons = [compare_pair(metric, arm, against, values) for arm, against in pairs]
    return {
        "name": metric.name,
        "measure": str(metric.measure),
        "label": metric.label,
        "better": metric.better,
        "level": metric.measure.level,
        "values": {arm: {str(seed): v.value for seed, v in by_seed.items()} for arm, by_seed in values.items()},
        "censored": {arm: [seed for seed, v in by_seed.items() if v.censored] for arm, by_seed in values.items()},
        "estimates": {arm: estimate([v.value for v in by_seed.values()]) for arm, by_seed in values.items()},
        "comparisons": comparisons,
        "expectations": [_judge(metric, expectation, values, records) for expectation in metric.expect],
    }


def _values(metric: Metric, arm: str, seeds: Sequence[int], records: Records) -> dict[int, Value]:
    """Returns the number of each finished run of an arm that has logged the metric."""
    by_seed = {}
    for seed in seeds:
        record, measure = records[arm, seed], metric.measure
        steps, values = series(record["history"], metric.name)
        if measure.arm is not None:
            # the level is where the other arm ends with this seed
            other = records[measure.arm, seed]
            ends = series(other["history"], metric.name)[1] if other["status"] == "finished" else []
            if not ends:
                continue
            measure = measure.to(measure.end(ends))
        if record["status"] == "finished" and values:
            by_seed[seed] = measure.of(steps, values, record["steps"])
    return by_seed


def estimate(values: Sequence[float]) -> dict[str, float | None] | None:
    """Returns mean and interval, for one value the mean alone, and for no value None."""
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None} if values else None
    return dataclasses.asdict(statistics.estimate(values))


def compare_pair(metric: Metric, arm: str, against: str, values: Values) -> dict[str, Any]:
    """Compares two arms on the seeds that both have."""
    seeds = [seed for seed in values[arm] if seed in values[against]]
    pair: dict[str, Any] = {"arm": arm, "against": against, "seeds": len(seeds)}
    if len(seeds) < 2:
        return pair | {"difference": None, "change": None, "verdict": "too few seeds", "apart": None}
    ours, theirs = ([values[name][seed].value for seed in seeds] for name in (arm, against))
    difference, ratio = statistics.difference(ours, theirs), statistics.ratio(ours, theirs)
    change = ratio and statistics.Estimate(ratio.mean - 1, ratio.low - 1, ratio.high - 1)
    return pair | {
        "difference": dataclasses.asdict(difference),
        "change": change and dataclasses.asdict(change),
        "verdict": statistics.verdict(difference, metric.better),
        "apart": statistics.apart(statistics.estimate(ours), statistics.estimate(theirs)),
    }


def _judge(metric: Metric, wanted: Expectation, values: Values, records: Records) -> dict[str, Any]:
    """Says whether an expectation holds. `met` is None where the runs do not allow a judgement."""
    arm, against = wanted.arm, wanted.against
    sign = 1 if metric.better == "higher" else -1
    text = f"{arm} {wanted.claim} {'to' if wanted.claim == 'identical' else 'than'} {against}"
    text += f" by at least {wanted.by:.0%}" if wanted.by is not None else ""
    text += f" within {wanted.within:g}" if wanted.within is not None else ""
    text += ", intervals apart" if wanted.apart else ""

    def answer(met: bool | None, detail: str) -> dict[str, Any]:
        judged = {"text": text, "arm": arm, "against": against, "met": met, "detail": detail}
        return judged if wanted.reason is None else judged | {"reason": wanted.reason}

    needed = (arm, against, metric.measure.arm)
    failed = [
        f"{name}, seed {seed}"
        for (name, seed), record in records.items()
        if name in needed and record["status"] != "finished"
    ]
    if failed:
        return answer(None, f"not judged, as runs are missing ({'; '.join(failed)})")
    silent = [f"{name}, seed {seed}" for name, seed in records if name in (arm, against) and seed not in values[name]]
    if silent:
        return answer(None, f"not judged, as runs have logged no number ({'; '.join(silent)})")
    if wanted.claim == "identical":
        largest = max(_distance(metric.name, records[arm, seed], records[against, seed]) for seed in values[arm])
        return answer(largest <= (wanted.within or 0.0), f"the curves differ by {largest:g} at most")
    pair = compare_pair(metric, arm, against, values)
    if pair["difference"] is None:
        return answer(None, "not judged: an interval needs at least two seeds")
    if wanted.claim == "not worse":
        loss = -pair["difference"]["low"] if sign > 0 else pair["difference"]["high"]
        assert wanted.within is not None
        return answer(loss <= wanted.within, f"worse by {max(loss, 0.0):.3g} at most (end of the 95% interval)")
    never = sum(v.censored for v in values[arm].values())
    if never:
        return answer(False, f"{never} of {len(values[arm])} runs of {arm} never reached the level")
    met, details = pair["verdict"] == "better", [pair["verdict"]]
    if wanted.by is not None:
        if pair["change"] is None:
            return answer(None, f"not judged: the mean of {against} is not above 0, so there is no share of it")
        ends = sorted(sign * pair["change"][end] for end in ("low", "high"))
        met = met and ends[0] >= wanted.by
        details.append(f"by {sign * pair['change']['mean']:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]")
    if wanted.apart:
        met = met and pair["apart"]
        details.append("intervals apart" if pair["apart"] else "intervals overlap")
    return answer(met, ", ".join(details))


def _distance(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Returns the largest difference of two curves, infinite where they are not logged at the same steps."""
    left, right = (series(record["history"], name) for record in (one, other))
    if left[0] != right[0]:
        return float("inf")
    return max((abs(a - b) for a, b in zip(left[1], right[1], strict=True)), default=0.0)
