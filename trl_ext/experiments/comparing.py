"""A comparison from the recipe to its results: checks, runs that are still to do, verdicts and files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import ConfigError, near
from . import curves, processes, records, results
from .measures import Measure
from .processes import Failure, Result, Said, Step, Tell, Worker
from .recipe import Metric, Prepared, Recipe
from .records import Job, UnwritableError
from .status import Status

Records = dict[tuple[str, int], dict[str, Any]]


def compare(recipe: Recipe, folder: Path, at_once: int | None, console: Console, command: str) -> dict[str, Any]:
    """Runs a comparison and returns everything that is known about it; `compare.json` holds the same.

    Args:
        recipe: What to compare.
        folder: Where records, logs and reports go. Runs that are there already are used.
        at_once: Number of runs at a time; None for one per core, or one where they share an accelerator.
        console: For progress.
        command: The command line, for the report.

    Raises:
        TrlExtError: The recipe cannot work, or nothing can be written.
    """
    began = time.monotonic()
    with locked(folder):
        with tempfile.TemporaryDirectory(prefix="trl_ext-") as scratch, console.status("loading TRL") as shown:
            say = shown.update if console.is_terminal else partial(console.print, markup=False, soft_wrap=True)
            prepared = processes.call(_prepare, recipe, log=os.path.join(scratch, "log"), say=say)
        recipe = dataclasses.replace(recipe, metrics=recipe.metrics or default_metrics(prepared.kind))
        jobs = make_jobs(recipe, prepared, folder / "runs")
        if at_once is None:
            at_once = 1 if prepared.accelerator else os.cpu_count() or 1
        runs = finish(recipe, jobs, at_once, console)
        summary = results.summarize(recipe, runs)
        arms = {arm.name: summary["arms"][arm.name] | _differences(recipe, prepared, arm.name) for arm in recipe.arms}
        completions = {f"{arm}/{seed}": run["completions"] for (arm, seed), run in runs.items() if run["completions"]}
        found = {
            "recipe": recipe.name,
            "claim": recipe.claim,
            "paper": recipe.paper,
            "command": command,
            "trainer": prepared.kind,
            "task": recipe.task,
            "sizes": recipe.sizes,
            "model": next((run["model"] for run in runs.values() if run.get("model")), None),
            "parameters": next((run["parameters"] for run in runs.values() if run.get("parameters")), None),
            "seeds": list(recipe.seeds),
            "settings": _shared(prepared),
            **summary,
            "arms": arms,
            "versions": next(iter(prepared.identities.values()))["versions"],
            "seconds": round(sum(run["seconds"] for run in runs.values()), 1),
            "at_once": at_once,
            "curves": curves.collect(recipe, runs),
            "completions": completions,
        }
        console.print(f"{len(jobs)} runs, {time.monotonic() - began:.0f} s", highlight=False)
        records.write(folder / "compare.json", found)
    return found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other comparisons out of it.

    Raises:
        TrlExtError: It cannot be written, or another comparison works in it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
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


def make_jobs(recipe: Recipe, prepared: Prepared, folder: Path) -> list[Job]:
    """All runs, seed by seed, so that a comparison that is stopped early has pairs."""
    return [
        Job(
            arm=arm.name,
            seed=seed,
            kind=prepared.kind,
            plugins=arm.plugins,
            settings=prepared.settings[arm.name],
            task=recipe.task,
            sizes=recipe.sizes,
            identity=prepared.identities[arm.name],
            folder=str(folder),
        )
        for seed in recipe.seeds
        for arm in recipe.arms
    ]


def finish(recipe: Recipe, jobs: Sequence[Job], at_once: int, console: Console) -> Records:
    """Does the runs that have no record yet; returns the records of all."""
    found = {job: record for job in jobs if (record := records.load(job)) is not None}
    for job, record in found.items():
        check_record(recipe.metrics, job.arm, record)
    pending = [job for job in jobs if job not in found]
    if found:
        console.print(f"{len(found)} of {len(jobs)} runs are there already", highlight=False)
    busy: dict[Worker, tuple[Job, set[str]]] = {}
    with Status(len(jobs), len(found), console) as status:
        try:
            while pending or busy:
                while pending and len(busy) < at_once:
                    job = pending.pop(0)
                    busy[processes.start(_train, job, log=str(job.file(".log")))] = (job, set())
                    status.started(job)
                for worker in processes.ready(list(busy), timeout=1.0):
                    job, names = busy[worker]
                    record = _listen(worker, job, names, recipe, status)
                    if record is not None:
                        del busy[worker]
                        found[job] = record
                        status.ended(job, record)
        finally:
            for worker in busy:
                worker.stop()
    return {(job.arm, job.seed): found[job] for job in jobs}


def _listen(worker: Worker, job: Job, names: set[str], recipe: Recipe, status: Status) -> dict[str, Any] | None:
    """Takes one message of a run; returns its record when that was the last one."""
    match worker.hear():
        case Said(text):
            status.console.print(text, highlight=False, markup=False, soft_wrap=True)
        case Step(done, total, new):
            names.update(new)
            status.step(job, done, total)
            if "loss" in names and 10 * done >= total:  # by then, whatever is logged during training has been
                check_names([m for m in recipe.metrics if not m.name.startswith("eval_")], job.arm, names)
        case Failure(message, error):
            if isinstance(error, UnwritableError):
                raise error
            return records.crashed(job, f"{message} (see {job.file('.log')})")
        case Result():
            record = records.load(job)
            assert record is not None
            check_record(recipe.metrics, job.arm, record)
            job.file(".log").unlink(missing_ok=True)
            return record
    return None


def check_names(metrics: Sequence[Metric], arm: str, logged: set[str]) -> None:
    """Refuses a metric that is not logged, as soon as that is known.

    Raises:
        ConfigError: Naming what is logged.
    """
    for metric in metrics:
        if metric.name not in logged:
            raise ConfigError(
                f"no metric called {metric.name!r} is logged by arm {arm!r}.{near(metric.name, logged)}\n"
                f"Correct `experiment.metrics` and start again; runs that have ended are not repeated."
            )


def check_record(metrics: Sequence[Metric], arm: str, record: dict[str, Any]) -> None:
    """The same of a run that has ended; one that diverged may have logged nothing yet, and its numbers do not count."""
    if record["status"] == "finished":
        check_names(metrics, arm, {name for entry in record["history"] for name in entry})


def default_metrics(kind: str) -> tuple[Metric, ...]:
    """What is compared where a recipe names no metrics."""
    return (Metric("rewards/accuracies" if kind == "dpo" else "reward", Measure("final"), "higher"),)


def _shared(prepared: Prepared) -> dict[str, Any]:
    """Settings that all arms have in common."""
    first, *others = prepared.settings.values()
    return {name: value for name, value in first.items() if all(o.get(name, _NONE) == value for o in others)}


def _differences(recipe: Recipe, prepared: Prepared, arm: str) -> dict[str, Any]:
    shared = _shared(prepared)
    return {
        "plugins": prepared.identities[arm]["plugins"],
        "settings": {name: value for name, value in prepared.settings[arm].items() if name not in shared},
    }


_NONE = object()


# In workers only: this process needs neither torch nor TRL.


def _prepare(recipe: Recipe, tell: Tell) -> Prepared:
    from .preparing import prepare

    return prepare(recipe, tell)


def _train(job: Job, tell: Tell) -> None:
    from .running import train

    train(job, tell)
