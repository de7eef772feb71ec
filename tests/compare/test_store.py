"""What is on disk is whole or not there."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from trl_ext.compare import store
from trl_ext.compare.runs import Run
from trl_ext.compare.store import UnwritableError
from trl_ext.errors import TrlExtError

from .conftest import file_size_limit


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
