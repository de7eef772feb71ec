"""From the records of all runs to numbers, verdicts and sentences: the content of `compare.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from . import stats
from .measures import Value, series
from .recipe import Expectation, Metric, Recipe

Runs = Mapping[tuple[str, int], Mapping[str, Any]]
"""(arm, seed) -> record."""
Values = dict[str, dict[int, Value]]
"""Arm -> seed -> value of one metric, of finished runs."""


def summarize(recipe: Recipe, runs: Runs) -> dict[str, Any]:
    """What the runs say about every metric, and whether that was expected."""
    found = [_metric(metric, recipe, runs) for metric in recipe.metrics]
    notes = []
    if len(recipe.seeds) == 1:
        notes.append("one seed: there are no intervals and no verdicts. Give two seeds or more.")
    elif stats.chance(len(recipe.seeds)) > 1 - stats.LEVEL:
        notes.append(
            f"{len(recipe.seeds)} seeds are few: arms that do not differ would get a verdict in "
            f"{stats.chance(len(recipe.seeds)):.0%} of such comparisons; from 6 seeds on it is less than 5%."
        )
    return {
        "arms": {arm.name: _arm(arm.name, recipe.seeds, runs) for arm in recipe.arms},
        "metrics": found,
        "notes": notes,
        "complete": all(run["status"] == "finished" for run in runs.values()),
        "met": all(entry["met"] for metric in found for entry in metric["expectations"]),
    }


def _arm(name: str, seeds: Sequence[int], runs: Runs) -> dict[str, Any]:
    failed = [
        {"seed": seed, "status": run["status"], "error": run["error"]}
        for seed in seeds
        if (run := runs[name, seed])["status"] != "finished"
    ]
    seconds = [runs[name, seed]["seconds"] for seed in seeds if runs[name, seed]["status"] == "finished"]
    return {
        "finished": len(seeds) - len(failed),
        "failed": failed,
        "seconds_per_run": round(sum(seconds) / len(seconds), 1) if seconds else None,
    }


def _metric(metric: Metric, recipe: Recipe, runs: Runs) -> dict[str, Any]:
    arms = [arm.name for arm in recipe.arms]
    values: Values = {arm: _values(metric, arm, recipe.seeds, runs) for arm in arms}
    pairs = [(arm, arms[0]) for arm in arms[1:]]
    pairs += [(e.arm, e.against) for e in metric.expect if (e.arm, e.against) not in pairs]
    comparisons = [compare(metric, arm, against, values) for arm, against in pairs]
    return {
        "name": metric.name,
        "measure": str(metric.measure),
        "label": metric.label,
        "better": metric.better,
        "level": metric.measure.level,
        "values": {arm: {str(seed): v.value for seed, v in found.items()} for arm, found in values.items()},
        "censored": {arm: [seed for seed, v in found.items() if v.censored] for arm, found in values.items()},
        "estimates": {arm: _estimate([v.value for v in found.values()]) for arm, found in values.items()},
        "comparisons": comparisons,
        "expectations": [_judge(metric, expectation, values, runs) for expectation in metric.expect],
    }


def _values(metric: Metric, arm: str, seeds: Sequence[int], runs: Runs) -> dict[int, Value]:
    found = {}
    for seed in seeds:
        run, measure = runs[arm, seed], metric.measure
        steps, values = series(run["history"], metric.name)
        if measure.arm is not None:
            other = runs[measure.arm, seed]
            ends = series(other["history"], metric.name)[1] if other["status"] == "finished" else []
            if not ends:
                continue
            measure = measure.to(measure.end(ends))
        if run["status"] == "finished" and values:
            found[seed] = measure.of(steps, values, run["steps"])
    return found


def _estimate(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean and interval; without the latter for one value, None for no value."""
    if len(values) < 2:
        return {"mean": values[0], "low": None, "high": None} if values else None
    return dataclasses.asdict(stats.estimate(values))


def compare(metric: Metric, arm: str, against: str, values: Values) -> dict[str, Any]:
    """Two arms on the seeds that both have."""
    seeds = [seed for seed in values[arm] if seed in values[against]]
    found: dict[str, Any] = {"arm": arm, "against": against, "seeds": len(seeds)}
    if len(seeds) < 2:
        return found | {"difference": None, "change": None, "verdict": "too few seeds", "apart": None}
    ours, theirs = ([values[name][seed].value for seed in seeds] for name in (arm, against))
    difference, ratio = stats.difference(ours, theirs), stats.ratio(ours, theirs)
    change = ratio and stats.Estimate(ratio.mean - 1, ratio.low - 1, ratio.high - 1)
    return found | {
        "difference": dataclasses.asdict(difference),
        "change": change and dataclasses.asdict(change),
        "verdict": stats.verdict(difference, metric.better),
        "apart": stats.apart(stats.estimate(ours), stats.estimate(theirs)),
    }


def _judge(metric: Metric, wanted: Expectation, values: Values, runs: Runs) -> dict[str, Any]:
    """Whether an expectation holds; `met` is None where the runs do not allow to say."""
    arm, against = wanted.arm, wanted.against
    sign = 1 if metric.better == "higher" else -1
    text = f"{arm} {wanted.claim} {'to' if wanted.claim == 'identical' else 'than'} {against}"
    text += f" by at least {wanted.by:.0%}" if wanted.by is not None else ""
    text += f" within {wanted.within:g}" if wanted.within is not None else ""
    text += ", intervals apart" if wanted.apart else ""

    def answer(met: bool | None, detail: str) -> dict[str, Any]:
        return {"text": text, "arm": arm, "against": against, "met": met, "detail": detail}

    failed = [f"{name}, seed {seed}" for (name, seed), run in runs.items() if run["status"] != "finished"]
    failed = [who for who in failed if who.rpartition(",")[0] in (arm, against, metric.measure.arm)]
    if failed:
        return answer(None, f"not judged, as runs are missing ({'; '.join(failed)})")
    silent = [f"{name}, seed {seed}" for name, seed in runs if name in (arm, against) and seed not in values[name]]
    if silent:
        return answer(None, f"not judged, as runs have logged no number ({'; '.join(silent)})")
    if wanted.claim == "identical":
        largest = max(_distance(metric.name, runs[arm, seed], runs[against, seed]) for seed in values[arm])
        return answer(largest <= (wanted.within or 0.0), f"the curves differ by {largest:g} at most")
    found = compare(metric, arm, against, values)
    if found["difference"] is None:
        return answer(None, "not judged: an interval needs at least two seeds")
    if wanted.claim == "not worse":
        loss = -found["difference"]["low"] if sign > 0 else found["difference"]["high"]
        assert wanted.within is not None
        return answer(loss <= wanted.within, f"worse by {max(loss, 0.0):.3g} at most (end of the 95% interval)")
    never = sum(v.censored for v in values[arm].values())
    if never:
        return answer(False, f"{never} of {len(values[arm])} runs of {arm} never reached the level")
    met, details = found["verdict"] == "better", [found["verdict"]]
    if wanted.by is not None:
        if found["change"] is None:
            return answer(None, f"not judged: the mean of {against} is not above 0, so there is no share of it")
        ends = sorted(sign * found["change"][end] for end in ("low", "high"))
        met = met and ends[0] >= wanted.by
        details.append(f"by {sign * found['change']['mean']:.0%} [{ends[0]:.0%}, {ends[1]:.0%}]")
    if wanted.apart:
        met = met and found["apart"]
        details.append("intervals apart" if found["apart"] else "intervals overlap")
    return answer(met, ", ".join(details))


def _distance(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Largest difference of two curves; infinite where they are not logged at the same steps."""
    left, right = (series(run["history"], name) for run in (one, other))
    if left[0] != right[0]:
        return float("inf")
    return max((abs(a - b) for a, b in zip(left[1], right[1], strict=True)), default=0.0)


def number(value: float | None) -> str:
    """A number for a table: three digits, and whole steps."""
    if value is None:
        return "?"
    return f"{value:.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3g}"


def interval(found: Mapping[str, float | None] | None, signed: bool = False) -> str:
    """`331 [290, 372]`."""
    if found is None:
        return "none"
    mean = number(found["mean"])
    mean = f"+{mean}" if signed and (found["mean"] or 0) > 0 else mean
    return mean if found["low"] is None else f"{mean} [{number(found['low'])}, {number(found['high'])}]"


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of a comparison: metric, arm, mean with interval, difference to another arm, verdict."""
    table = []
    for metric in summary["metrics"]:
        label = metric["label"]
        pairs = {entry["arm"]: entry for entry in reversed(metric["comparisons"])}
        for arm, estimate in metric["estimates"].items():
            never = len(metric["censored"][arm])
            failed = len(summary["arms"][arm]["failed"])
            remark = f" ({never} never)" if never else ""
            remark += f" ({failed} failed)" if failed else ""
            found = pairs.get(arm)
            verdict, change = "", ""
            if found is not None:
                change = interval(found["difference"], signed=True) if found["difference"] else ""
                verdict = found["verdict"]
                if verdict in ("better", "worse"):
                    verdict += f" than {found['against']}"
                elif verdict == "not distinguishable":
                    verdict += f" from {found['against']}"
            table.append([label, arm, interval(estimate) + remark, change, verdict])
            label = ""
    return table


COLUMNS = ("metric", "arm", "mean [95% interval]", "difference", "verdict")


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """What a person should read after the table: expectations, failed runs, notes."""
    lines = []
    for metric in summary["metrics"]:
        for entry in metric["expectations"]:
            answer = {True: "yes", False: "NO", None: "UNKNOWN"}[entry["met"]]
            lines.append(f"expected: {metric['label']}: {entry['text']}: {answer} ({entry['detail']})")
    for name, arm in summary["arms"].items():
        lines += [f"{failed['status']}: {name}, seed {failed['seed']}: {failed['error']}" for failed in arm["failed"]]
    return lines + [f"note: {note}" for note in summary["notes"]]
