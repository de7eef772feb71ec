"""Methods for tool calls give the same numbers on one process and on two, with groups on both, and after a resume."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "tool_processes.py"
CORE = HERE.parent / "end_to_end" / "test_processes.py"
_spec = importlib.util.spec_from_file_location("processes", CORE)
assert _spec and _spec.loader
core = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(core)
Report = dict[str, Any]


@pytest.mark.slow
def test_one_and_two_processes_agree(tool_model: str, tmp_path: Path) -> None:
    one = core.here(tool_model, tmp_path, SCRIPT)
    two = core.two_processes(tool_model, tmp_path, SCRIPT)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in ("otc", "otc-resumed", "hdpo", "hdpo-resumed", "hdpo-rows", "hdpo-otc"):
        same(name, one[name], [report[name] for report in two])
        core.same_parameters(name, tmp_path)
    for name in ("otc", "hdpo"):
        resumed_exactly(name, one, two, tmp_path)
    remembered(one["otc"], [report["otc"] for report in two])
    for name in ("hdpo", "hdpo-rows", "hdpo-otc"):
        assert all(0 < share < 1 for share in one[name]["shares"][:1]), name
    # the group that lies on both processes has a tool signal on both, and tokens and rows give different shares
    assert one["hdpo"]["tools"][0][5] > 0 > one["hdpo"]["tools"][0][6]
    assert one["hdpo"]["shares"] != pytest.approx(one["hdpo-rows"]["shares"])


def same(name: str, one: Report, two: list[Report]) -> None:
    """Rewards, advantages, counts and shares, on every process, and the metrics of the methods."""
    for report in two:
        assert report["calls"] == one["calls"], name
        for key in ("rewards", "advantages", "tools", "shares"):
            torch.testing.assert_close(
                torch.tensor(report[key]), torch.tensor(one[key]), atol=1e-6, rtol=0, msg=lambda text: f"{name}: {text}"
            )
    checked = 0
    for first, second in zip(one["metrics"][:-1], two[0]["metrics"][:-1], strict=True):
        for key in first:
            if key.startswith(("otc/", "hdpo/", "rewards/", "loss", "grad_norm")):
                assert second[key] == pytest.approx(first[key], rel=1e-4, abs=1e-5), (name, key)
                checked += 1
    assert checked > 10


def resumed_exactly(name: str, one: Report, two: list[Report], folder: Path) -> None:
    """Steps 2 and 3 again, from the checkpoint after step 1."""
    for report in (one, *two):
        for key in ("rewards", "advantages", "tools", "shares"):
            assert report[f"{name}-resumed"][key] == report[name][key][1:], key
        assert report[f"{name}-resumed"].get("memory") == report[name].get("memory")
    for part in ("1-0", "2-0", "2-1"):
        whole, resumed = (torch.load(folder / f"{run}-{part}.pt") for run in (name, f"{name}-resumed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def remembered(one: Report, two: list[Report]) -> None:
    """The group that lies on both processes was solved with 1 call in the first round and never again."""
    assert one["memory"] == two[0]["memory"] == two[1]["memory"] and len(one["memory"]) == 2
    assert one["calls"][0][4:8] == [3, 1, 3, 0] and [row[0] > 0 for row in one["rewards"][0][4:8]] == [
        False,
        True,
        True,
        False,
    ]
    assert sorted(one["memory"].values()) == [0, 1]
    calls, formats = one["calls"][1][4:8], [row[1] for row in one["rewards"][1][4:8]]
    base = [float(row % 3 > 0) for row in range(4, 8)]
    expected = [value * math.sin(math.pi * m / (m + 1)) for value, m in zip(base, calls, strict=True)]
    assert formats == pytest.approx(expected, abs=1e-6) and len(set(calls)) > 1
