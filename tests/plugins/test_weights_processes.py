"""VERL and dynamic reward weighting give the same numbers on one process and on two, and after a resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "weights_processes.py"
_spec = importlib.util.spec_from_file_location("core_processes", HERE.parent / "end_to_end" / "test_processes.py")
assert _spec and _spec.loader
core = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(core)
Report = dict[str, Any]
RUNS = ("verl", "gradient", "volume")
MEANS_OF_ROWS = ("verl-rank/", "dynamic-weights/", "loss", "grad_norm")


@pytest.mark.slow
def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    one, two = core.here(model, tmp_path, SCRIPT), core.two_processes(model, tmp_path, SCRIPT)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in RUNS:
        for report in (one, *two):
            assert report[f"{name}-resumed"]["advantages"] == report[name]["advantages"][1:]
            assert report[f"{name}-resumed"]["state"] == report[name]["state"]
        assert two[0][name]["state"] == two[1][name]["state"]
        same(name, one[name], two)
        core.same_parameters(name, tmp_path)
    # each method has done something
    assert one["verl"]["metrics"][1]["verl-rank/raised"] > 0
    assert one["gradient"]["weights"][0] == [1, 1] and abs(one["gradient"]["weights"][2][0] - 1) > 0.01
    assert 0.5 <= one["volume"]["state"]["factor"] < 1


def same(name: str, one: Report, two: list[Report]) -> None:
    """Advantages, weights and state of every process, and the metrics of the methods."""
    for report in (process[name] for process in two):
        for key in ("advantages", "weights"):
            torch.testing.assert_close(
                torch.tensor(report[key]),
                torch.tensor(one[key]),
                atol=2e-4,
                rtol=1e-3,
                msg=lambda text, key=key: f"{name}, {key}: {text}",
            )
    checked = 0
    for first, second in zip(one["metrics"][:-1], two[0][name]["metrics"][:-1], strict=True):
        for key in first:
            if key.startswith(MEANS_OF_ROWS):
                assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), (name, key)
                checked += 1
    assert checked > 8
