"""Brackets in names, paths, options and errors: every command prints them as they are, as none of them is markup."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from tests.train.histories import finished, training
from trl_ext import ConfigError
from trl_ext.bench import overhead, probes, shared_prefix, speedup_plot
from trl_ext.catalog import find
from trl_ext.catalog.declaration import PluginSpec
from trl_ext.cli import doctor, main, plugins, show
from trl_ext.compare.progress import ProgressDisplay
from trl_ext.compare.runs import Run
from trl_ext.plan.check import make_plan
from trl_ext.plan.show import print_plan
from trl_ext.support import child_errors, console
from trl_ext.support.tables import print_table
from trl_ext.testing import checks, tiny_args
from trl_ext.train import summary
from trl_ext.train.command_line import Request
from trl_ext_hooks import Config, Plugin, hookimpl

BRACKETS = "[red]x[/y] a[b]"
"""Rich would swallow `[red]`, and stop at `[/y]`."""


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`printed(*argv)` runs the console script in a wide terminal and returns all that it prints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*argv: str) -> str:
        capsys.readouterr()
        main.main(list(argv))
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return out.out + out.err

    return run


@pytest.mark.parametrize(
    "argv",
    [
        [BRACKETS],
        ["--plugin", BRACKETS],
        ["train", BRACKETS],
        ["doctor", BRACKETS],
        ["completion", BRACKETS],
        ["plugins", "--trainer", BRACKETS],
        ["train", "--plugin", BRACKETS],
        ["train", "--set", f"gdpo.{BRACKETS}=1", "--plugin", "gdpo"],
        ["train", "--config", BRACKETS],
        ["train", "--trainer", BRACKETS],
        ["train", "--resume_from_checkpoint", BRACKETS],
        ["show", BRACKETS],
        ["check", "--plugin", BRACKETS],
        ["inspect", BRACKETS],
        ["inspect", "--plugin", BRACKETS],
        ["compare", BRACKETS],
        ["new", BRACKETS],
        ["bench", "shared-prefix", "--shape", BRACKETS],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_errors(argv: list[str], printed: Callable[..., str]) -> None:
    assert BRACKETS in printed(*argv)


def test_list_of_plugins(printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    entry: dict[str, Any] = dict.fromkeys(("name", "version", "origin", "paper", "summary"), BRACKETS)
    entry |= {"hooks": [BRACKETS], "trainers": [BRACKETS], "broken": None}
    monkeypatch.setattr(plugins, "listing", lambda: [entry, entry | {"broken": BRACKETS}])
    assert printed("plugins").count(BRACKETS) == 3 + 2


def test_declaration_of_a_plugin(printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    option = dict.fromkeys(("name", "type", "default", "help", "source"), BRACKETS) | {
        "required": False,
        "bounds": {"gt": 0},
    }
    lists = {key: [BRACKETS] for key in ("trainers", "hooks", "needs", "claims", "fields", "state")}
    plugin: dict[str, Any] = dict.fromkeys(("name", "version", "origin", "paper", "summary"), BRACKETS)
    monkeypatch.setattr(show, "declaration", lambda reference: plugin | lists | {"options": [option]})
    assert printed("show", "it").count(BRACKETS) == 5 + 6 + 5 + 4


def test_findings_of_the_doctor(printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    maps = ("versions", "system", "environment", "trainers", "plugins")
    findings: dict[str, Any] = {key: {BRACKETS: BRACKETS} for key in maps}
    findings |= {"devices": [BRACKETS], "extras": dict.fromkeys(doctor.EXTRAS), "problems": [BRACKETS]}
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    text = printed("doctor")
    assert text.count(BRACKETS) == 3 * 2 + 1 + 1 + 2 + 1  # names of trainers are in capitals
    assert BRACKETS.upper() in text
    assert all(hint in text for hint in doctor.EXTRAS.values()) and "pip install 'trl_ext[flash-attn]'" in text


@pytest.mark.parametrize("passed", [True, False])
def test_checks_of_a_plugin(passed: bool, printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def conformance(*args: Any, progress: Callable[[str], None], **settings: Any) -> list[checks.Check]:
        progress(BRACKETS)
        return [checks.Check(BRACKETS, passed, BRACKETS)]

    monkeypatch.setattr(checks, "conformance", conformance)
    mark = "ok  " if passed else "FAIL"
    assert f"{mark} {BRACKETS}: {BRACKETS}\n" in printed("check", "--plugin", "gdpo")


def test_benchmarks(printed: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    row = {"name": BRACKETS, "seconds": 1.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0}
    monkeypatch.setattr(overhead, "measure", lambda *args: [row])
    assert BRACKETS in printed("bench", "overhead")
    monkeypatch.setattr(probes, "measure", lambda *args: [row | {"share": 0.5, "token_ratio": None}])
    assert BRACKETS in printed("bench", "probes")
    monkeypatch.setattr(shared_prefix, "load_model", lambda path: None)
    monkeypatch.setattr(shared_prefix, "measure", lambda model, shapes, repeats, show: show(BRACKETS) or [])
    monkeypatch.setattr(speedup_plot, "draw", lambda rows, path: None)
    assert f"wrote {BRACKETS}\n" in printed("bench", "shared-prefix", "--plot", BRACKETS)


def test_plan_and_notes_of_a_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    class Bracketed(Plugin):
        name = BRACKETS
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> None:
            return None

    monkeypatch.setattr(PluginSpec, "option_values", {BRACKETS: BRACKETS})
    spec = PluginSpec(Bracketed, None, "test", BRACKETS, BRACKETS)
    config = Config("grpo", tiny_args("grpo", tmp_path), ("digits",), ("prompt",), ())
    plan = make_plan(find.resolve({"gdpo": None}), config)
    print_plan(dataclasses.replace(plan, specs=(spec,), notes=(BRACKETS,)))
    text = capsys.readouterr().err
    assert f"note: {BRACKETS}\n" in text
    assert text.count(BRACKETS) == 1 + 2 + 2 + 1  # the stage, name and version, the option, the note


def test_summary_of_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    history = [
        {name.replace("good", BRACKETS): value for name, value in training(step).items()} for step in range(1, 4)
    ]
    trainer, parsed = finished(tmp_path / BRACKETS.replace("/", "-"), history)
    summary.write_summary(trainer, Request({}, (), "grpo", None, {}, []), parsed, 3.0, "finished")
    text = capsys.readouterr().out
    assert BRACKETS in text and BRACKETS.replace("/", "-") in text


def test_errors_of_a_worker(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(child_errors.FOLDER, str(tmp_path))
    child_errors.write_error(ConfigError(BRACKETS))
    child_errors.print_errors(tmp_path, 1)
    assert capsys.readouterr().err == f"error: {BRACKETS}\n"


def test_tables_consoles_and_spinners(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    print_table([BRACKETS], [[BRACKETS]], title=BRACKETS, file=stream)
    output = console.console(file=stream, width=80)
    output.print(BRACKETS)
    assert stream.getvalue().count(BRACKETS) == 4
    with console.status(BRACKETS) as change:
        change(BRACKETS)
    with console.progress_bar(BRACKETS) as advance:
        advance(1, 2)


def test_bars_of_a_comparison() -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=200)
    run = Run(BRACKETS, 1, "grpo", {}, {}, None, {}, {}, "")
    with ProgressDisplay(2, 0, terminal) as display:
        display.started(run)
        display.step(run, 1, 2)
        display.progress.refresh()
        display.ended(run, {"status": BRACKETS, "seconds": 1.0, "error": BRACKETS})
    with console.status(BRACKETS, terminal):
        pass
    assert stream.getvalue().count(BRACKETS) >= 5
