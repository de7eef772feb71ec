"""DECS and SPAE give the same numbers on one process and on two, with groups on both, and after a resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "credit_processes.py"
_spec = importlib.util.spec_from_file_location("core_processes", HERE.parent / "end_to_end" / "test_processes.py")
assert _spec and _spec.loader
core = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(core)
Report = dict[str, Any]
RUNS = ("decs", "decs-rows", "spae", "spae-rows")
SEEN = ("rewards", "advantages", "kept", "items")


@pytest.mark.slow
def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    one, two = core.here(model, tmp_path, SCRIPT), core.two_processes(model, tmp_path, SCRIPT)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in (*RUNS, "decs-resumed", "spae-resumed"):
        same(name, one[name], [report[name] for report in two])
        core.same_parameters(name, tmp_path)
    for name in ("decs", "spae"):
        resumed_exactly(name, one, two, tmp_path)
    curriculum(one["decs"], [report["decs"] for report in two])
    # what one process cannot do stops both
    assert one["failing"] is None
    assert two[1]["failing"] == "OSError: this process cannot reach the judge"
    assert two[0]["failing"] == f"JudgeError: stopped with another process: {two[1]['failing']}"


def same(name: str, one: Report, two: list[Report]) -> None:
    """Advantages of every token, rows that were kept, the denominator, and the metrics of the methods."""
    # SPAE divides by the range of the gains, which a random model makes tiny: a millionth grows to a thousandth
    rtol = 1e-3 if name.startswith("spae") else 1e-5
    for report in two:
        for key in SEEN:
            torch.testing.assert_close(
                torch.tensor(report[key]).double(),
                torch.tensor(one[key]).double(),
                atol=1e-3,  # sums over tokens, weighted with their places
                rtol=rtol,
                msg=lambda text, key=key: f"{name}, {key}: {text}",
            )
        assert report.get("state") == pytest.approx(one.get("state"))
    assert two[0]["widths"] != two[1]["widths"]
    assert any(any(abs(row[0]) > 0 for row in round[4:8]) for round in one["advantages"]), name  # the group on both
    assert any(0 in lengths for lengths in one["kept"]) and all(any(lengths) for lengths in one["kept"]), name
    checked = 0
    for first, second in zip(one["metrics"][:-1], two[0]["metrics"][:-1], strict=True):
        for key in first:
            # what the trees of two processes share is another matter
            if key.startswith(("decs/", "spae/", "loss", "grad_norm")) and "token_ratio" not in key:
                assert second[key] == pytest.approx(first[key], rel=2e-3, abs=1e-4), (name, key)
                checked += 1
    assert checked > 15, name


def resumed_exactly(name: str, one: Report, two: list[Report], folder: Path) -> None:
    """Steps 2 and 3 again, from the checkpoint after step 1."""
    for report in (one, *two):
        for key in SEEN:
            assert report[f"{name}-resumed"][key] == report[name][key][1:], (name, key)
        assert report[f"{name}-resumed"].get("state") == report[name].get("state")
    for part in ("1-0", "2-0", "2-1"):
        whole, resumed = (torch.load(folder / f"{run}-{part}.pt") for run in (name, f"{name}-resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def curriculum(one: Report, two: list[Report]) -> None:
    """Easy prompts were dropped and taken, the same ones on every process, and kappa has moved."""
    taken = [{row // 4 for row, length in enumerate(lengths) if length} for lengths in one["kept"]]
    assert len({len(groups) for groups in taken}) > 1, taken
    assert one["state"]["kappa"] not in (0.0, 0.35) and one["state"]["rounds"] == 3
    assert all(report["state"] == two[0]["state"] for report in two)
