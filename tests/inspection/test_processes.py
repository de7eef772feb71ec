"""One process and two record the same round, with a group that lies on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import processes
from trl_ext.inspection import file_format
from trl_ext.inspection.file_format import Recording

SCRIPT = Path(__file__).parent / "scripts" / "rounds.py"


@pytest.mark.slow
def test_one_and_two_processes_record_the_same(model: str, recorded: Recording, tmp_path: Path) -> None:
    done = processes.launch(2, SCRIPT, model, str(tmp_path))
    assert done.stderr.count("Look at them with: trl_ext inspect") == 1
    files = file_format.find(str(tmp_path))
    assert [path.name for path in files] == ["round-1.json", "round-2.json"]
    two = file_format.read(files[0])
    assert (two.processes, recorded.processes) == (2, 1)
    assert [len(row.ids) for row in two.rows[:6]] != [len(row.ids) for row in two.rows[6:]]
    for name in ("trainer", "round", "step", "left_out", "plugins", "prompts", "reward_stages", "advantage_stages"):
        assert getattr(two, name) == getattr(recorded, name), name
    for one, other in zip(recorded.rows, two.rows, strict=True):
        for name in ("row", "group", "prompt", "ids", "tokens", "mask", "columns", "spans", "curves"):
            assert getattr(one, name) == getattr(other, name), (one.row, name)
        for name in ("rewards", "advantages", "fields", "values"):
            same(getattr(one, name), getattr(other, name), f"row {one.row}: {name}")


def same(one: Any, other: Any, what: str) -> None:
    """Equal up to rounding, lists and dicts all the way down."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), what
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other), what
        for left, right in zip(one, other, strict=True):
            same(left, right, what)
    elif isinstance(one, float):
        assert other == pytest.approx(one, abs=1e-5), what
    else:
        assert one == other, what
