"""Conformance checks that every plugin should pass, on a tiny model in seconds.

from trl_ext.testing import conformance
assert all(check.passed for check in conformance("my_method.py", tmp_path))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext_hooks import TrainerKind

from ..catalog import declaration
from ..catalog import find as catalog_find
from ..errors import TrlExtError
from ..plan.stages import ROUNDS, TOOL_SOURCES
from ..support.quiet import quiet
from ..tools import calculator
from .failures import where_it_failed
from .tiny import calls, tiny_model
from .trial_runs import TrialRuns

SHAPES_SAMPLING = {"select_rows", "rollout", "trainer_arguments"}
"""Hooks that may change what the first round generates."""


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str


def conformance(
    reference: str,
    folder: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    kinds: Sequence[TrainerKind] | None = None,
    trainer: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    **settings: Any,
) -> list[Check]:
    """Trains a plugin for two steps of every trainer that it declares, and checks what its author cannot see.

    Args:
        reference: Name, `file.py` or `module:attribute`.
        folder: An empty folder for models and runs.
        options: Options of the plugin.
        kinds: The trainers to check, by default all that it declares.
        trainer: Further arguments of the trainer, such as `tools`. Without them, a plugin that needs tools gets a
            calculator and rollouts that call it.
        processes: Also trains on this many processes and compares with one, if it is above 1. What `settings` hold must
            then be picklable.
        progress: Called with the name of each check as it begins.
        settings: Arguments of `trl_ext.testing.tiny_trainer` that the plugin needs: training arguments, `rewards`,
            `data`, `model`.

    Returns:
        The results in order. That of a failed check says what happened and what was expected. Whatever the plugin or a
        reward function raises is such a result, with the hook and the line.
    """
    folder = Path(folder)
    checklist = _Checklist(progress)
    specs: list[declaration.PluginSpec] = []

    def declared() -> str:
        specs.extend(catalog_find.resolve({reference: options}))
        return f"{specs[0].name}: {', '.join(specs[0].hooks) or 'no hooks'}"

    if not checklist.check("declaration", declared):
        return checklist.checks
    spec = specs[0]
    if "run" in spec.hooks:
        detail = "not looked at: it owns a whole run, which only its own tests can check"
        return [*checklist.checks, Check("runs", True, detail)]
    needs_tools = "tools" in spec.cls.needs
    with_tools = needs_tools or "trainer_arguments" in spec.hooks
    with quiet():
        model = settings.pop("model", None) or tiny_model(folder / "model", tools=with_tools)
    for kind in kinds or spec.cls.trainers:
        arguments: dict[str, Any] = {"trainer": dict(trainer or {}), **settings}
        if kind == "grpo" and needs_tools and not set(TOOL_SOURCES) & set(arguments["trainer"]):
            arguments = _with_calculator(model, arguments)
        runs = TrialRuns(kind, model, folder, reference, options, arguments, spec)
        _check_trainer(checklist, runs, processes)
    return checklist.checks


class _Checklist:
    """Runs checks and keeps their results."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.checks: list[Check] = []
        self._progress = progress

    def check(self, name: str, test: Callable[[], str]) -> bool:
        """Runs a check and returns whether it passed."""
        self._progress(name)
        try:
            self.checks.append(Check(name, True, test()))
        except (AssertionError, TrlExtError) as error:
            self.checks.append(Check(name, False, str(error)))
        except Exception as error:  # code of the plugin, a reward function or the data may raise anything
            self.checks.append(Check(name, False, where_it_failed(error)))
        return self.checks[-1].passed


def _with_calculator(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds a calculator to the arguments of a trainer, and rollouts that call it."""
    rollouts: dict[str, Any] = {"max_completion_length": 150, "max_tool_calling_iterations": 2}
    rollouts["generation_kwargs"] = calls(model, "calculator", likelihood=5.0, expression="6 * 7")
    return rollouts | arguments | {"trainer": arguments["trainer"] | {"tools": [calculator]}}


def _check_trainer(checklist: _Checklist, runs: TrialRuns, processes: int) -> None:
    """Runs the checks with one trainer. The first one makes the run that the others compare with."""
    kind, hooks = runs.kind, set(runs.spec.hooks)
    if not checklist.check(f"{kind}: trains, every hook fires", runs.trains):
        return
    checklist.check(f"{kind}: it learns from the data", runs.learns)
    checklist.check(f"{kind}: it changes what plain TRL does", runs.differs)
    checklist.check(f"{kind}: the same run gives the same numbers", runs.repeats)
    if kind != "dpo" and not SHAPES_SAMPLING & hooks:
        checklist.check(f"{kind}: setting it up leaves the random stream alone", runs.samples_like_stock)
    checklist.check(f"{kind}: a resumed run ends where an uninterrupted one does", runs.resumes)
    if kind in ROUNDS and "inspect" in hooks:
        checklist.check(f"{kind}: recording a round changes nothing", runs.records)
    if processes > 1:
        checklist.check(f"{kind}: {processes} processes give the numbers of one", lambda: runs.distributes(processes))
    checklist.check(f"{kind}: switching it off restores the trainer", runs.restores)
    checklist.check(f"{kind}: what its hooks take", runs.costs)
