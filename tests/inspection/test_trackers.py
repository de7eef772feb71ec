"""What reaches trackers: metrics of plugins, TRL's table of completions, and recorded rounds as tables, read back."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import trl_ext
from tests import processes
from trl_ext.inspection import file_format, tracker_table
from trl_ext.trl_internals import trackers

METRIC = "train/gdpo/zero_std/digits"


def test_a_recorded_round_as_a_table(build: Any) -> None:
    with trl_ext.enable("gdpo") as handle:
        handle.record(rounds=1)
        trainer = build(max_steps=1)
        trainer.train()
        recording = file_format.read(Path(trainer.args.output_dir) / "inspect" / "round-1.json")
        table = tracker_table.table(recording)
    assert [*table] == [
        *("step", "round", "group", "row", "prompt", "completion", "reward digits", "reward brevity"),
        *("advantage after TRL", "advantage after gdpo", "kept"),
    ]
    assert {len(values) for values in table.values()} == {8}
    assert "assistant" in table["prompt"][0] and table["group"] == [0] * 4 + [1] * 4
    assert table["advantage after gdpo"] == [row.advantages[1] for row in recording.rows]
    assert table["reward digits"] == [row.rewards[-1][0] for row in recording.rows]


class Calls:
    """Stands for W&B: a module with a run, a table and a log."""

    def __init__(self, run: Any) -> None:
        self.run, self.logged = run, []

    Table = staticmethod(lambda dataframe: dataframe.to_dict("list"))

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)


@pytest.mark.parametrize("run", ["a run", None])
def test_wandb_gets_a_table_where_it_runs(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(run)
    monkeypatch.setitem(sys.modules, "wandb", calls)
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(report_to=["wandb"]))
    trackers.log_table(trainer, "trl_ext/round", {"row": [0, 1], "text": ["a", "b"]})
    assert calls.logged == ([{"trl_ext/round": {"row": [0, 1], "text": ["a", "b"]}}] if run else [])


def test_cells_of_tensorboard_hold_no_markup() -> None:
    text = trackers._markdown({"a|b": ["<script>x</script>\n*y*", None], "n": [0.1234567, 2]})
    assert text.splitlines() == [
        "| a&#124;b | n |",
        "| --- | --- |",
        "| &#60;script&#62;x&#60;/script&#62;<br>&#42;y&#42; | 0.123457 |",
        "|  | 2 |",
    ]


needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
needs_trackio = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")


@needs_tensorboard
def test_tensorboard_for_real(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    with trl_ext.enable("gdpo") as handle:
        handle.record(rounds=1)
        build(max_steps=2, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = events.Tags()
    assert {METRIC, "train/gdpo/advantage_change"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars(METRIC)] == [1, 2]
    (text,) = [tag for tag in tags["tensors"] if tag.startswith("trl_ext/round")]
    (event,) = events.Tensors(text)
    shown = event.tensor_proto.string_val[0].decode()
    assert shown.startswith("| step | round |") and "advantage after gdpo" in shown and shown.count("\n") == 9


SCRIPT = """
import sys
import trl_ext
from trl_ext.testing import tiny_trainer

with trl_ext.enable("gdpo") as handle:
    handle.record(rounds=1)
    settings = {"report_to": sys.argv[3], "project": "plugins", "run_name": "one", "log_completions": True}
    tiny_trainer("grpo", sys.argv[1], sys.argv[2], max_steps=2, **settings).train()
"""


def _train(model: str, folder: Path, tracker: str, **environment: str) -> None:
    """Trains in a process of its own, because trackers look at the environment when they are imported."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment
    command = [sys.executable, "-c", SCRIPT, model, str(folder / "run"), tracker]
    done = processes.run(command, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_trackio
def test_trackio_for_real(model: str, tmp_path: Path) -> None:
    _train(model, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "plugins.db") as database:
        logged = [json.loads(text) for (text,) in database.execute("select metrics from metrics order by id")]
    assert len([entry for entry in logged if METRIC in entry]) == 2
    tables = {name: entry[name] for entry in logged for name in ("completions", "trl_ext/round") if name in entry}
    assert set(tables) == {"completions", "trl_ext/round"}
    first_completion = next(entry["completions"]["_value"][0] for entry in logged if "completions" in entry)
    (first, *others) = tables["trl_ext/round"]["_value"]
    assert len(others) == 7 and first["advantage after gdpo"] != first["advantage after TRL"]
    assert first["advantage after gdpo"] == pytest.approx(first_completion["advantage"], abs=1e-5)


@needs_wandb
def test_wandb_for_real(model: str, tmp_path: Path) -> None:
    _train(model, tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    files = {file.parent.name: file for file in tmp_path.rglob("*.table.json") if "/files/media/" in str(file)}
    table = json.loads(files["trl_ext"].read_text())
    assert "advantage after gdpo" in table["columns"] and len(table["data"]) == 8
    (binary,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert METRIC.encode() in binary.read_bytes()
