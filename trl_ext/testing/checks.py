"""The checks that every plugin should pass, on a tiny model in seconds. Used by `trl_ext check` and by plugins' tests.

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
from . import calls, metrics_of, tiny_model, tiny_trainer

SHAPES_SAMPLING = {"select_rows", "rollout", "trainer_arguments"}
"""Hooks that may change what the first round generates."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

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
    """Trains the plugin for a few steps of every trainer that it declares, and checks what an author cannot see.

    Args:
        reference: Name, `file.py` or `module:attribute`.
        folder: An empty folder for models and runs.
        options: Options of the plugin.
        kinds: Only these of its trainers.
        trainer: Further arguments of the trainer, such as `tools`. A plugin that needs tools gets a calculator, and
            rollouts that call it, where none are given.
        progress: Called with the name of each check as it begins.
        settings: What the plugin needs of `trl_ext.testing.tiny_trainer`: training arguments, `rewards`, `data`,
            `model`.

    Returns:
        One entry per check; a failed one says what happened and what was expected.
    """
    checks: list[Check] = []
    folder = Path(folder)

    def check(name: str, test: Callable[[], str]) -> bool:
        progress(name)
        try:
            checks.append(Check(name, True, test()))
        except (AssertionError, TrlExtError) as error:
            checks.append(Check(name, False, str(error)))
        return checks[-1].passed

    specs: list[declaration.PluginSpec] = []

    def declared() -> str:
        specs.extend(catalog_find.resolve({reference: options}))
        return f"{specs[0].name}: {', '.join(specs[0].hooks) or 'no hooks'}"

    if not check("declaration", declared):
        return checks
    spec = specs[0]
    if "run" in spec.hooks:
        checks.append(Check("runs", True, "not looked at: it owns a whole run, which only its own tests can check"))
        return checks
    needs_tools = "tools" in spec.cls.needs
    with_tools = needs_tools or "trainer_arguments" in spec.hooks
    model = settings.pop("model", None) or tiny_model(folder / "model", tools=with_tools)
    for kind in kinds or spec.cls.trainers:
        arguments: dict[str, Any] = {"trainer": dict(trainer or {}), **settings}
        if kind == "grpo" and needs_tools and not set(TOOL_SOURCES) & set(arguments["trainer"]):
            arguments["trainer"]["tools"] = [calculator]
            called: dict[str, Any] = {"max_completion_length": 150, "max_tool_calling_iterations": 2}
            called["generation_kwargs"] = calls(model, "calculator", likelihood=5.0, expression="6 * 7")
            arguments = called | arguments
        runs = _Runs(kind, model, folder, reference, options, arguments)
        if check(f"{kind}: trains, every hook fires", runs.trains):
            check(f"{kind}: the same run gives the same numbers", runs.repeats)
            if kind != "dpo" and not SHAPES_SAMPLING & set(spec.hooks):
                check(f"{kind}: setting it up leaves the random stream alone", runs.samples_like_stock)
            check(f"{kind}: a resumed run ends where an uninterrupted one does", runs.resumes)
            if kind in ROUNDS and "inspect" in spec.hooks:
                check(f"{kind}: recording a round changes nothing", runs.records)
            check(f"{kind}: switching it off restores the trainer", runs.restores)
    return checks


@dataclasses.dataclass
class _Runs:
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
            ours = self.build("ours", max_steps=1)
            ours.train()
        assert trainer_state.logged_completions(stock) == trainer_state.logged_completions(ours), (
            "the first round has other completions than plain TRL: something drew random numbers before it. Draw them "
            "from a generator of your own."
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
    for a, b in zip(metrics_of(left), metrics_of(right), strict=True):
        differing = [key for key in a if a[key] != b.get(key)]
        assert not differing, f"{differing[0]} is {a[differing[0]]} and then {b.get(differing[0])} in the same run"


def _same_weights(left: Any, right: Any) -> None:
    import torch

    for (name, a), b in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs by up to {(a - b).abs().max().item():.2g}; is state missing?"


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
