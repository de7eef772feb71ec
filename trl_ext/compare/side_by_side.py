"""The comparison of finished runs: the content of a report as a recipe's comparison has it, without a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, near
from . import mean_curves, statistics, verdicts
from .finished_runs import FinishedRun
from .measures import Measure, series
from .recipe import Metric

Arms = Mapping[str, Sequence[FinishedRun]]
_FINAL = Measure("final")


def compare(arms: Arms, names: Sequence[str], command: str) -> dict[str, Any]:
    """Returns what the runs of some arms say, as in `compare.json`.

    Args:
        arms: Arm -> its runs. The first arm is the one that the others are compared with.
        names: The metrics to compare, or none for those that are shown unasked.
        command: The command line, for the page.

    Raises:
        ConfigError: A metric is not logged.
    """
    paired = _are_paired(arms)
    keyed = {arm: _by_seed(runs, paired) for arm, runs in arms.items()}
    metrics = [_metric(name, keyed, paired) for name in (names or _shown(arms))]
    logged = {name for runs in arms.values() for run in runs for entry in run.history for name in entry}
    for name in names:
        if name not in logged:
            raise ConfigError(f"no run has logged a metric called {name!r}.{near(name, logged - {'step', 'epoch'})}")
    shared, own = _facts(arms)
    content: dict[str, Any] = {
        "recipe": "finished runs",
        "claim": "",
        "paper": "",
        "command": command,
        "trainer": shared.get("trainer"),
        "task": None,
        "sizes": {},
        "model": shared.get("model"),
        "parameters": None,
        "seeds": sorted({seed for runs in keyed.values() for seed in runs}),
        "paired": paired,
        "settings": shared,
        "arms": {arm: _arm(runs, own[arm]) for arm, runs in arms.items()},
        "metrics": metrics,
        "notes": _notes(arms, own, paired),
        "complete": True,
        "met": True,
        "versions": shared.pop("versions", {}),
        "seconds": sum(run.seconds or 0.0 for runs in arms.values() for run in runs),
        "at_once": None,
        "curves": _curves([metric["name"] for metric in metrics], keyed),
        "completions": {},
    }
    return content | {"headline": verdicts.headline(content)}


def _are_paired(arms: Arms) -> bool:
    """Says whether every run has a seed, no arm has one twice, and all arms have the same ones."""
    seeds = [[run.seed for run in runs] for runs in arms.values()]
    return all(
        None not in values and len(set(values)) == len(values) and set(values) == set(seeds[0]) for values in seeds
    )


def _by_seed(runs: Sequence[FinishedRun], paired: bool) -> dict[int, FinishedRun]:
    """Returns the runs by their seeds, or numbered where seeds pair nothing."""
    return {run.seed if paired and run.seed is not None else index: run for index, run in enumerate(runs, start=1)}


def _shown(arms: Arms) -> list[str]:
    """Returns the metrics of at least two arms that are shown unasked, with those of evaluations after them."""
    logged = [{name for run in runs for entry in run.history for name in entry} for runs in arms.values()]
    common = {name for names in logged for name in names if sum(name in others for others in logged) > 1}
    evaluated = {name.removeprefix("eval_") for name in common if name.startswith("eval_")}
    chosen = [*mean_curves.shown(common), *(f"eval_{name}" for name in mean_curves.shown(evaluated))]
    return chosen or [name for name in ("loss", "eval_loss") if name in common] or sorted(logged[0] & common)[:1]


def _metric(name: str, arms: Mapping[str, Mapping[int, FinishedRun]], paired: bool) -> dict[str, Any]:
    """Returns values, estimates and comparisons of a metric, as `verdicts.summarize` does."""
    values: verdicts.Values = {}
    for arm, runs in arms.items():
        logged = {seed: series(run.history, name) for seed, run in runs.items()}
        values[arm] = {seed: _FINAL.of(*points, runs[seed].steps) for seed, points in logged.items() if points[1]}
    estimates = {arm: verdicts.estimate([value.value for value in found.values()]) for arm, found in values.items()}
    first, *others = values
    good = "rewards/" in name or name.removeprefix("eval_") == "reward"
    return {
        "name": name,
        "measure": str(_FINAL),
        "label": f"{name}: {_FINAL}",
        "better": "higher" if good else None,
        "level": None,
        "values": {arm: {str(seed): value.value for seed, value in found.items()} for arm, found in values.items()},
        "censored": {arm: [] for arm in values},
        "estimates": estimates,
        "comparisons": [_pair(Metric(name=name, better="higher"), arm, first, values, paired, good) for arm in others],
        "expectations": [],
    }


def _pair(metric: Metric, arm: str, against: str, values: verdicts.Values, paired: bool, good: bool) -> dict[str, Any]:
    """Compares two arms. Without two runs of each there is a difference and no verdict."""
    ours, theirs = ([value.value for value in values[name].values()] for name in (arm, against))
    pair: dict[str, Any] = {"arm": arm, "against": against, "seeds": min(len(ours), len(theirs)), "change": None}
    if not ours or not theirs:
        return pair | {"difference": None, "verdict": "not logged by both", "apart": None}
    change = math.fsum(ours) / len(ours) - math.fsum(theirs) / len(theirs)
    pair["difference"] = {"mean": change, "low": None, "high": None}
    if len(ours) < 2 or len(theirs) < 2:
        return pair | {"verdict": "one run, no verdict", "apart": None}
    if paired:
        pair = verdicts.compare_pair(metric, arm, against, values)
        verdict = pair["verdict"]
    else:
        pair["apart"] = statistics.apart(statistics.estimate(ours), statistics.estimate(theirs))
        verdict = ("better" if change > 0 else "worse") if pair["apart"] else "intervals overlap, no verdict"
    if not good:  # nobody has said which direction is the good one
        verdict = {"better": "higher", "worse": "lower"}.get(verdict, verdict)
    return pair | {"verdict": verdict}


def _arm(runs: Sequence[FinishedRun], facts: Mapping[str, Any]) -> dict[str, Any]:
    seconds = [run.seconds for run in runs if run.seconds is not None]
    return {
        "finished": len(runs),
        "failed": [],
        "seconds_per_run": round(sum(seconds) / len(seconds), 1) if seconds else None,
        "plugins": runs[0].plugins or [],
        "settings": dict(facts),
        "folders": [str(run.folder) for run in runs],
    }


def _facts(arms: Arms) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns what all runs have in common, and for each arm what they have not."""
    runs = [run for arm_runs in arms.values() for run in arm_runs]
    first = runs[0].facts
    known = [name for name in first if all(name in run.facts for run in runs)]
    shared = {name: first[name] for name in known if all(run.facts[name] == first[name] for run in runs)}
    own: dict[str, dict[str, Any]] = {}
    for arm, arm_runs in arms.items():
        own[arm] = {}
        for name in known:
            if name not in shared:
                distinct = list(dict.fromkeys(str(run.facts[name]) for run in arm_runs))
                own[arm][name] = " and ".join(distinct)
    return shared, own


def _notes(arms: Arms, own: Mapping[str, Mapping[str, Any]], paired: bool) -> list[str]:
    """Says what a reader has to know before believing a difference."""
    notes = []
    counts = {arm: len(runs) for arm, runs in arms.items()}
    if min(counts.values()) == 1:
        alone = ", ".join(arm for arm, count in counts.items() if count == 1)
        notes.append(
            f"one run of {alone}: another seed may turn a difference around, so there is no verdict. Train with more "
            f"seeds, and name the runs of an arm together: NAME=FOLDER NAME=FOLDER."
        )
    elif paired and statistics.chance(min(counts.values())) > 1 - statistics.LEVEL:
        notes.append(verdicts.few_seeds(min(counts.values())))
    elif not paired:
        first = next(iter(counts.values()))
        chance = max(2 / math.comb(first + count, first) for count in [*counts.values()][1:])
        text = "runs are not paired by seed, so arms count as different only where their intervals do not overlap."
        if chance > 1 - statistics.LEVEL:
            text += f" With so few runs equal arms would be told apart in {chance:.0%} of such comparisons."
        notes.append(text)
    for name in next(iter(own.values())):
        listed = ", ".join(f"{facts[name]} ({arm})" for arm, facts in own.items())
        different = "the runs have different versions of packages." if name == "versions" else ""
        notes.append(different or f"the arms differ in {name}: {listed}.")
    for arm, runs in arms.items():
        notes += [f"{arm}: {run.folder}: {run.remark}." for run in runs if run.remark]
        if any(run.plugins != runs[0].plugins for run in runs):
            notes.append(f"the runs of {arm} have different plugins or options, so their interval mixes methods.")
    unknown = [arm for arm, runs in arms.items() if any(run.plugins is None for run in runs)]
    if unknown:
        notes.append(f"plugins, model and data of {', '.join(unknown)} are not known: TRL does not record them.")
    return notes


def _curves(names: Sequence[str], arms: Mapping[str, Mapping[int, FinishedRun]]) -> dict[str, dict[str, Any]]:
    """Returns metric -> arm -> mean curve, as `mean_curves.collect` does."""
    curves: dict[str, dict[str, Any]] = {}
    for name in names:
        for arm, runs in arms.items():
            points = {seed: dict(zip(*series(run.history, name), strict=True)) for seed, run in runs.items()}
            points = {seed: values for seed, values in points.items() if values}
            if points and set.intersection(*(set(values) for values in points.values())):
                curves.setdefault(name, {})[arm] = mean_curves.mean_curve(points)
    return curves
