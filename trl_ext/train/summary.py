"""Summary of a run: a table of before and after, `trl_ext_run.json` and a picture of the curves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import counted
from ..support.files import write_atomically
from ..support.tables import print_table
from ..support.versions import versions
from ..trl_internals.arguments import Parsed
from . import curves
from .command_line import Request
from .log_metrics import is_evaluation, is_training, shown
from .output_folder import PICTURE, RECORD


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The shown metrics before and after training.

    Attributes:
        source: Where they come from, in words.
        before: Values by label.
        after: Values by label.
    """

    source: str
    before: dict[str, float]
    after: dict[str, float]


def before_and_after(history: Sequence[Mapping[str, Any]]) -> Comparison | None:
    """Compares the first with the last evaluation, or the first with the last steps if there are fewer than two."""
    evaluations = [(logs.get("step", 0), shown(logs, "eval_")) for logs in history if is_evaluation(logs)]
    evaluations = [entry for entry in evaluations if entry[1]]
    if len(evaluations) >= 2:
        (first, before), (last, after) = evaluations[0], evaluations[-1]
        start = "before training" if first == 0 else f"after step {first}"
        return Comparison(f"held-out prompts, {start} and after step {last}", before, after)
    steps = [values for logs in history if is_training(logs) and (values := shown(logs))]
    if len(steps) < 2:
        return None
    # single steps are noisy, so up to five of them are averaged at each end
    width = max(1, min(5, len(steps) // 2))
    what = "first and last log entry" if width == 1 else f"means of the first and the last {width} log entries"
    return Comparison(f"training prompts, {what} (no held-out evaluation)", _mean(steps[:width]), _mean(steps[-width:]))


def _mean(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    columns = {name: [entry[name] for entry in entries if not math.isnan(entry.get(name, math.nan))] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


def write_summary(trainer: Any, request: Request, parsed: Parsed, seconds: float, status: str) -> None:
    """Prints the table and writes the files into the output folder. Called on the main process.

    Args:
        trainer: The trainer.
        request: What the user asked for.
        parsed: TRL's arguments.
        seconds: How long training took.
        status: `finished` or `interrupted`.
    """
    folder = Path(trainer.args.output_dir)
    history = trainer.state.log_history
    comparison = before_and_after(history)
    if comparison is not None:
        rows = [
            [name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"]
            for name, before in comparison.before.items()
            if (after := comparison.after.get(name)) is not None
        ]
        print_table(["", "before", "after", "change"], rows, title=comparison.source)
    write_record(trainer, request, parsed, seconds, status)
    written = [RECORD]
    picture = curves.draw(history, _title(request, parsed, trainer))
    if picture is not None:
        write_atomically(folder / PICTURE, picture)
        written.insert(0, PICTURE)
    steps = counted(trainer.state.global_step, "step")
    print(f"{steps} in {seconds:.0f} s; {' and '.join(written)} in {folder}", flush=True)


def write_record(trainer: Any, request: Request, parsed: Parsed, seconds: float, status: str) -> None:
    """Writes `trl_ext_run.json`, when training begins and when it ends. Arguments as in `write_summary`."""
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = describe(trainer, request, parsed, seconds, status)
    write_atomically(folder / RECORD, json.dumps(content, indent=2, default=str) + "\n")


def describe(trainer: Any, request: Request, parsed: Parsed, seconds: float, status: str) -> dict[str, Any]:
    """Returns the content of `trl_ext_run.json`."""
    script, training, model, mixture = parsed
    session = vars(trainer).get("_trl_ext")
    calls: dict[str, dict[str, int]] = {spec.name: {} for spec in request.specs}
    for (plugin, hook), count in sorted(session.calls.items()) if session is not None else ():
        calls[plugin][hook] = count
    history = trainer.state.log_history
    comparison = before_and_after(history)
    steps = [dict(logs) for logs in history if is_training(logs)]
    data = request.task or script.dataset_name or [source.path for source in mixture.datasets]
    return {
        "command": request.command,
        "folder": os.getcwd(),
        "config": request.config_to_repeat,
        "filled_in": request.filled_in,
        "started": request.started,
        "status": status,
        "trainer": request.kind,
        "plugins": [
            {"name": spec.name, "version": spec.version, "origin": spec.origin, "options": spec.option_values}
            for spec in request.specs
        ],
        "hooks_fired": calls,
        "versions": versions(),
        "model": model.model_name_or_path or trainer.model.config.name_or_path,
        "data": data,
        "output_dir": str(training.output_dir),
        "seed": training.seed,
        "processes": int(trainer.accelerator.num_processes),
        "device": str(trainer.accelerator.device),
        "steps": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "seconds": round(seconds, 1),
        "first": steps[0] if steps else None,
        "last": steps[-1] if steps else None,
        "comparison": dataclasses.asdict(comparison) if comparison is not None else None,
        "history": history,
    }


def _title(request: Request, parsed: Parsed, trainer: Any) -> str:
    plugins = " + ".join(spec.name for spec in request.specs) or "no plugins"
    name = request.task or os.path.basename(str(parsed[2].model_name_or_path).rstrip("/"))
    return f"{plugins} on {request.kind.upper()}, {name}, {counted(trainer.state.global_step, 'step')}"
