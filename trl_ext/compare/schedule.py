"""The schedule of a comparison: the recipe is checked, the missing runs are done, several at a time, and judged."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, counted, near
from ..support.console import status
from . import child_process, mean_curves, store, verdicts
from .child_process import ChildProcess, Failure, Result, Said, Step, Tell
from .estimate import Estimate, estimate, roughly
from .progress import ProgressDisplay
from .recipe import Metric, Recipe
from .runs import Prepared, Records, Run, list_runs
from .store import UnwritableError

if TYPE_CHECKING:
    from rich.console import Console

_NONE = object()


def run_comparison(recipe: Recipe, folder: Path, at_once: int | None, console: Console, command: str) -> dict[str, Any]:
    """Runs a comparison and returns everything that is known about it, as in `compare.json`.

    Args:
        recipe: What to compare.
        folder: Where records, logs and pages go. Runs that are there already are used.
        at_once: Number of runs at a time. None for one per core, or one where they share an accelerator.
        console: For progress.
        command: The command line, for the page.

    Raises:
        TrlExtError: The recipe cannot work, or nothing can be written.
    """
    began = time.monotonic()
    with locked(folder):
        with tempfile.TemporaryDirectory(prefix="trl_ext-") as scratch, status("", console) as show:
            say = show if console.is_terminal else partial(console.print, markup=False, soft_wrap=True)
            prepared = child_process.call(_prepare, recipe, log=os.path.join(scratch, "log"), say=say)
        recipe = dataclasses.replace(recipe, metrics=recipe.metrics or default_metrics(prepared.kind))
        runs = list_runs(recipe, prepared, folder / "runs")
        if at_once is None:
            at_once = 1 if prepared.accelerator else os.cpu_count() or 1
        records = finish(recipe, runs, at_once, console)
        summary = verdicts.summarize(recipe, records)
        ended = records.values()
        content = {
            "recipe": recipe.name,
            "paper": recipe.paper,
            "command": command,
            "trainer": prepared.kind,
            "task": recipe.task,
            "sizes": recipe.sizes,
            "model": next((record["model"] for record in ended if record.get("model")), None),
            "parameters": next((record["parameters"] for record in ended if record.get("parameters")), None),
            "seeds": list(recipe.seeds),
            "paired": True,
            "settings": _shared(prepared),
            **summary,
            "arms": {arm: summary["arms"][arm] | _differences(prepared, arm) for arm in recipe.arms},
            "versions": next(iter(prepared.identities.values()))["versions"],
            "seconds": round(sum(record["seconds"] for record in ended), 1),
            "at_once": at_once,
            "curves": mean_curves.collect(recipe, records),
            "completions": {
                f"{arm}/{seed}": record["completions"]
                for (arm, seed), record in records.items()
                if record["completions"]
            },
        }
        console.print(f"{counted(len(runs), 'run')}, {time.monotonic() - began:.0f} s", highlight=False)
        store.write(folder / "compare.json", content)
    return content


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other comparisons out of it.

    Raises:
        TrlExtError: It cannot be written, or another comparison works in it.
    """
    from filelock import FileLock, Timeout

    store.make_folder(folder / "runs")
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"another comparison works in {folder}. Wait for it, or choose another folder with --output."
        ) from error
    except OSError as error:
        raise UnwritableError(
            f"cannot write into {folder}: {error.strerror}. Choose another folder with --output."
        ) from error
    try:
        yield
    finally:
        lock.release()


def finish(recipe: Recipe, runs: Sequence[Run], at_once: int, console: Console) -> Records:
    """Does the runs that have no record yet, and returns the records of all.

    Raises:
        ConfigError: A metric is not logged.
        UnwritableError: The disk is full.
    """
    records = {run: record for run in runs if (record := store.load(run)) is not None}
    for run, record in records.items():
        check_record(recipe.metrics, run.arm, record)
    pending = [run for run in runs if run not in records]
    if records:
        console.print(f"{len(records)} of {len(runs)} runs are there already", highlight=False)
    expected = estimate(recipe, records)
    if pending:
        _announce(recipe, pending, at_once, expected, console)
    busy: dict[ChildProcess, tuple[Run, set[str]]] = {}
    with ProgressDisplay(len(runs), len(records), console, expected.seconds, at_once) as display:
        try:
            while pending or busy:
                while pending and len(busy) < at_once:
                    run = pending.pop(0)
                    busy[child_process.start(_train, run, log=str(run.file(".log")))] = (run, set())
                    display.started(run)
                for child in child_process.ready(list(busy), timeout=1.0):
                    run, names = busy[child]
                    new_record = _listen(child, run, names, recipe, display)
                    if new_record is not None:
                        del busy[child]
                        records[run] = new_record
                        display.ended(run, new_record)
                display.tick()
        finally:
            for child in busy:
                child.stop()
    return {(run.arm, run.seed): records[run] for run in runs}


def _announce(recipe: Recipe, pending: Sequence[Run], at_once: int, expected: Estimate, console: Console) -> None:
    """Says what is going to happen and how long it will take."""
    total = expected.total(pending, at_once)
    processes = min(at_once, len(pending))
    lines = [
        f"{len(recipe.arms)} arms, {len(recipe.seeds)} seed{'s' * (len(recipe.seeds) != 1)}: "
        f"{len(pending)} run{'s' * (len(pending) != 1)} to do, each in a process of its own, {processes} at a time",
        f"about {roughly(total)}, from {expected.source}" if total else f"no estimate: {expected.source}",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _listen(
    child: ChildProcess, run: Run, names: set[str], recipe: Recipe, display: ProgressDisplay
) -> dict[str, Any] | None:
    """Takes one message of a run, and returns its record if that was the last one.

    Args:
        child: The process.
        run: The run that it does.
        names: The metrics that the run has logged so far, which are added to.
        recipe: With the metrics that it has to log.
        display: For its progress.
    """
    match child.receive():
        case Said(text):
            display.console.print(text, highlight=False, markup=False, soft_wrap=True)
        case Step(done, total, new):
            names.update(new)
            display.step(run, done, total)
            if "loss" in names and 10 * done >= total:  # by then, everything that training logs has been logged once
                check_names([m for m in recipe.metrics if not m.name.startswith("eval_")], run.arm, names)
        case Failure(message, error):
            if isinstance(error, UnwritableError):
                raise error
            return store.crashed(run, f"{message} (see {run.file('.log')})")
        case Result():
            record = store.load(run)
            assert record is not None
            check_record(recipe.metrics, run.arm, record)
            run.file(".log").unlink(missing_ok=True)
            return record
    return None


def check_names(metrics: Sequence[Metric], arm: str, logged: set[str]) -> None:
    """Refuses a metric that an arm does not log.

    Raises:
        ConfigError: Naming what is logged.
    """
    for metric in metrics:
        if metric.name not in logged:
            raise ConfigError(
                f"no metric called {metric.name!r} is logged by arm {arm!r}.{near(metric.name, logged)}\n"
                f"Correct `experiment.metrics` and start again. Runs that have ended are not repeated."
            )


def check_record(metrics: Sequence[Metric], arm: str, record: dict[str, Any]) -> None:
    """Refuses a metric that a finished run has not logged. A diverged run may have logged nothing, and does not count.

    Raises:
        ConfigError: Naming what is logged.
    """
    if record["status"] == "finished":
        check_names(metrics, arm, {name for entry in record["history"] for name in entry})


def default_metrics(kind: str) -> tuple[Metric, ...]:
    """Returns what is compared where a recipe names no metrics."""
    return (Metric(name="rewards/accuracies" if kind == "dpo" else "reward"),)


def _shared(prepared: Prepared) -> dict[str, Any]:
    """Returns the settings that all arms have in common."""
    first, *others = prepared.settings.values()
    return {name: value for name, value in first.items() if all(o.get(name, _NONE) == value for o in others)}


def _differences(prepared: Prepared, arm: str) -> dict[str, Any]:
    """Returns the plugins of an arm, and the settings that not all arms have."""
    shared = _shared(prepared)
    return {
        "plugins": prepared.identities[arm]["plugins"],
        "settings": {name: value for name, value in prepared.settings[arm].items() if name not in shared},
    }


# Called in child processes only: the parent needs neither torch nor TRL.


def _prepare(recipe: Recipe, tell: Tell) -> Prepared:
    from .prepare import prepare

    return prepare(recipe, tell)


def _train(run: Run, tell: Tell) -> None:
    from .run_one import train

    train(run, tell)
