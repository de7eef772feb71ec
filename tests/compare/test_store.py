"""What is on disk is whole or not there, and its name changes with what determines a run and with nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from trl_ext.compare import store
from trl_ext.compare.runs import Run
from trl_ext.compare.store import UnwritableError
from trl_ext.errors import TrlExtError

from .conftest import file_size_limit


@pytest.fixture
def run(tmp_path: Path) -> Run:
    identity = {"settings": {"beta": 0.0}, "plugins": [], "versions": {"trl": "1.16.0"}}
    return Run("plain", 3, "grpo", {}, {"beta": 0.0}, "tiny", {}, identity, str(tmp_path))


def test_a_record_comes_back(run: Run) -> None:
    assert store.load(run) is None
    store.save(run, {"status": "finished", "history": [{"loss": math.nan, "reward": 0.5}]})
    assert store.load(run) == {
        "arm": "plain",
        "seed": 3,
        "key": run.key,
        "status": "finished",
        "history": [{"loss": None, "reward": 0.5}],
    }
    assert [file.name for file in Path(run.folder).iterdir()] == [f"plain-3-{run.key[:10]}.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"identity": {"settings": {"beta": 0.1}, "plugins": [], "versions": {"trl": "1.16.0"}}},
        {"identity": {"settings": {"beta": 0.0}, "plugins": ["gdpo"], "versions": {"trl": "1.16.0"}}},
        {"identity": {"settings": {"beta": 0.0}, "plugins": [], "versions": {"trl": "1.15.0"}}},
    ],
    ids=str,
)
def test_the_key_changes_with_what_determines_the_numbers(change: dict[str, Any], run: Run) -> None:
    assert dataclasses.replace(run, **change).key != run.key


def test_the_key_does_not_change_with_names_and_places(run: Run, tmp_path: Path) -> None:
    assert dataclasses.replace(run, arm="baseline", folder="elsewhere").key == run.key
    reordered = {"versions": {"trl": "1.16.0"}, "plugins": [], "settings": {"beta": 0.0}}
    assert dataclasses.replace(run, identity=reordered).key == run.key


def test_a_file_of_another_run_is_not_taken(run: Run) -> None:
    store.write(run.file(".json"), {"key": "of another run"})
    assert store.load(run) is None


def test_half_a_record_is_named(run: Run) -> None:
    run.file(".json").write_text('{"key": ')
    with pytest.raises(TrlExtError, match=r"is not a record of a run .* Remove it"):
        store.load(run)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    store.write(file, {"old": 1})
    with file_size_limit(os.getpid(), 1000), pytest.raises(UnwritableError, match=r"cannot write .*found.json: File"):
        store.write(file, {"new": "x" * 2000})
    assert json.loads(file.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [file]
    with pytest.raises(UnwritableError, match="No such file or directory"):
        store.write(tmp_path / "nowhere" / "found.json", {})


def test_plain_values() -> None:
    value = {1: (math.inf, -math.inf, 2.5), "path": Path("a"), "yes": True, "none": None}
    assert store.plain(value) == {"1": [None, None, 2.5], "path": "a", "yes": True, "none": None}
