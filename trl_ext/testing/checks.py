"""Conformance checks that every plugin should pass, on a tiny model in seconds.

from trl_ext.testing import conformance
assert all(check.passed for check in conformance("my_method.py", tmp_path))
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_ext_hooks import TrainerKind

from .. import api
from ..catalog import declaration
from ..catalog import find as catalog_find
from ..errors import TrlExtError
from ..inspection.file_format import find, read
from ..plan.stages import ROUNDS, TOOL_SOURCES
from ..tools import calculator
from ..trl_internals import trainer_state
from .tiny import calls, metrics_of, tiny_model, tiny_trainer

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
        progress: Called with the name of each check as it begins.
        settings: Arguments of `trl_ext.testing.tiny_trainer` that the plugin needs: training arguments, `rewards`,
            `data`, `model`.

    Returns:
        The results in order. That of a failed check says what happened and what was expected.
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
    model = settings.pop("model", None) or tiny_model(folder / "model", tools=with_tools)
    for kind in kinds or spec.cls.trainers:
        arguments: dict[str, Any] = {"trainer": dict(trainer or {}), **settings}
        if kind == "grpo" and needs_tools and not set(TOOL_SOURCES) & set(arguments["trainer"]):
            arguments = _with_calculator(model, arguments)
        _check_trainer(checklist, spec, _Runs(kind, model, folder, reference, options, arguments))
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
        return self.checks[-1].passed


def _with_calculator(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds a calculator to the arguments of a trainer, and rollouts that call it."""
    rollouts: dict[str, Any] = {"max_completion_length": 150, "max_tool_calling_iterations": 2}
    rollouts["generation_kwargs"] = calls(model, "calculator", likelihood=5.0, expression="6 * 7")
    return rollouts | arguments | {"trainer": arguments["trainer"] | {"tools": [calculator]}}


def _check_trainer(checklist: _Checklist, spec: declaration.PluginSpec, runs: _Runs) -> None:
    """Runs the checks with one trainer. The first one makes the run that the others compare with."""
    kind = runs.kind
    if not checklist.check(f"{kind}: trains, every hook fires", runs.trains):
        return
    checklist.check(f"{kind}: the same run gives the same numbers", runs.repeats)
    if kind != "dpo" and not SHAPES_SAMPLING & set(spec.hooks):
        checklist.check(f"{kind}: setting it up leaves the random stream alone", runs.samples_like_stock)
    checklist.check(f"{kind}: a resumed run ends where an uninterrupted one does", runs.resumes)
    if kind in ROUNDS and "inspect" in spec.hooks:
        checklist.check(f"{kind}: recording a round changes nothing", runs.records)
    checklist.check(f"{kind}: switching it off restores the trainer", runs.restores)


@dataclasses.dataclass
class _Runs:
    """Runs of one plugin with one trainer. Every check returns its detail, or raises AssertionError."""

    kind: Any
    model: str
    folder: Path
    reference: str
    options: Mapping[str, Any] | None
    settings: dict[str, Any]
    first: Any = None

    def build(self, name: str, **settings: Any) -> Any:
        output = self.folder / f"{self.kind}-{name}"
        return tiny_trainer(self.kind, self.model, output, **{**self.settings, **settings})

    def train(self, name: str, resume: str | None = None, **settings: Any) -> Any:
        with quiet(), api.enable({self.reference: self.options}):
            trainer = self.build(name, **settings)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    def trains(self) -> str:
        self.first = self.train("first", save_strategy="steps", save_steps=1)
        losses = [entry["loss"] for entry in self.first.state.log_history if "loss" in entry]
        assert len(losses) == 2, f"expected 2 logged steps, got {len(losses)}"
        assert all(loss == loss for loss in losses), f"the loss is not a number: {losses}"
        return f"losses {', '.join(f'{loss:.4g}' for loss in losses)}"

    def repeats(self) -> str:
        _same_metrics(self.first, self.train("second"))
        _same_weights(self.first, self.train("third"))
        return "metrics and weights are equal"

    def samples_like_stock(self) -> str:
        with quiet():
            stock = self.build("stock", max_steps=1)
            stock.train()
        with quiet(), api.enable({self.reference: self.options}):
            extended = self.build("ours", max_steps=1)
            extended.train()
        assert trainer_state.logged_completions(stock) == trainer_state.logged_completions(extended), (
            "the first round has other completions than plain TRL, so something drew random numbers before it. Draw "
            "them from a generator of your own."
        )
        return "the first round has the completions of plain TRL"

    def resumes(self) -> str:
        checkpoint = os.path.join(self.first.args.output_dir, "checkpoint-1")
        resumed = self.train("resumed", resume=checkpoint, save_strategy="no")
        _same_weights(self.first, resumed)
        return "weights are equal"

    def records(self) -> str:
        with quiet(), api.enable({self.reference: self.options}) as handle:
            handle.record()
            trainer = self.build("recorded")
            trainer.train()
        _same_weights(self.first, trainer)
        rows = read(find(trainer.args.output_dir)[0]).rows
        return f"{sum(len(row.spans) for row in rows)} spans, {sum(len(row.curves) for row in rows)} curves"

    def restores(self) -> str:
        assert type(self.first).__mro__[0].__module__.startswith("trl."), f"the class is {type(self.first)}"
        assert "_trl_ext" not in vars(self.first), "the trainer still holds its plugins"
        return type(self.first).__name__


def _same_metrics(left: Any, right: Any) -> None:
    for first, second in zip(metrics_of(left), metrics_of(right), strict=True):
        for name, value in first.items():
            assert value == second.get(name), f"{name} is {value} and then {second.get(name)} in the same run"


def _same_weights(left: Any, right: Any) -> None:
    import torch

    for (name, ours), theirs in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        difference = (ours - theirs).abs().max().item()
        assert torch.equal(ours, theirs), f"{name} differs by up to {difference:.2g}; is state missing?"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides progress bars, tables and warnings of the runs inside the block."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
