"""A team with Dr. MAS gives the same numbers on one process and on two with unequal rows, and after a resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "team_processes.py"
_spec = importlib.util.spec_from_file_location("team_core", HERE.parent / "end_to_end" / "test_processes.py")
assert _spec and _spec.loader
core = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(core)
Report = dict[str, Any]
NAMES = ("prompt", "prompt-resumed", "trajectory")


@pytest.mark.slow
def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    one, two = core.here(model, tmp_path, SCRIPT), core.two_processes(model, tmp_path, SCRIPT)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in NAMES:
        for report in two:
            for alone, several in zip(one[name]["rounds"], report[name]["rounds"], strict=True):
                same_round(alone, several)
        for alone, several in zip(one[name]["metrics"][:-1], two[0][name]["metrics"][:-1], strict=True):
            for key in alone:
                if key.startswith(("dr-mas/", "loss", "grad_norm", "reward")):
                    assert several[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-5), (name, key)
        core.same_parameters(name, tmp_path)
    for report in (one, *two):
        assert report["prompt-resumed"]["rounds"] == report["prompt"]["rounds"][1:]
    for part in ("1-0", "2-0", "2-1"):
        whole, resumed = (torch.load(tmp_path / f"{run}-{part}.pt") for run in NAMES[:2])
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def same_round(one: Report, two: Report) -> None:
    """All rows in one order, although the second process was filled up."""
    assert (one["filled"], two["filled"]) == (0, 3)
    assert len(one["agent"]) == 29 and one["agent"] == two["agent"] and one["trajectory"] == two["trajectory"]
    for key in ("rewards", "advantages"):
        assert two[key] == pytest.approx(one[key], abs=1e-4), key
    assert any(two["advantages"])
