"""VL-DAC gives the same numbers on one process and on two, whose value networks stay equal, and after a resume."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "scripts" / "vl_dac_processes.py"
CORE = HERE.parent / "end_to_end" / "test_processes.py"
_spec = importlib.util.spec_from_file_location("core_processes", CORE)
assert _spec and _spec.loader
core = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(core)


@pytest.mark.slow
def test_one_and_two_processes_agree(tool_model: str, tmp_path: Path) -> None:
    one = core.here(tool_model, tmp_path, SCRIPT)
    two = core.two_processes(tool_model, tmp_path, SCRIPT)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in ("whole", "accumulated"):
        assert two[0][name]["steps"] + two[1][name]["steps"] == one[name]["steps"]
        assert max(two[0][name]["steps"]) != max(two[1][name]["steps"]) and 0 in one[name]["steps"]
        same_metrics(name, one[name]["metrics"], two[0][name]["metrics"])
    saved = {path.stem: torch.load(path) for path in tmp_path.glob("*-?-?.pt")}
    for name in ("whole", "accumulated", "resumed", "environment"):
        left, right = saved[f"{name}-2-0"], saved[f"{name}-2-1"]
        assert equal(left["policy"], right["policy"]) and equal(left["critic"]["head"], right["critic"]["head"]), name
    for name in ("whole", "accumulated"):
        for key, value in saved[f"{name}-1-0"]["policy"].items():
            torch.testing.assert_close(saved[f"{name}-2-0"]["policy"][key], value, atol=2e-5, rtol=0)
    for part in ("1-0", "2-0", "2-1"):  # from the checkpoint after the round that trained the value alone
        whole, resumed = saved[f"whole-{part}"], saved[f"resumed-{part}"]
        assert equal(whole["policy"], resumed["policy"]) and equal(whole["critic"]["head"], resumed["critic"]["head"])
        for number, state in whole["critic"]["optimizer"]["state"].items():
            assert equal(state, resumed["critic"]["optimizer"]["state"][number]) and state["step"] == 6


def equal(left: dict[Any, Any], right: dict[Any, Any]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


PER_MICRO_BATCH = ("clip_ratio", "kl", "guarded_steps", "skipped_steps")
"""Ratios that are averaged over micro-batches, whose rows are others on two processes."""


def same_metrics(name: str, one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    checked = 0
    for first, second in zip(one[:-1], two[:-1], strict=True):
        assert first.keys() == second.keys()
        for key in first:
            if name == "accumulated" and key.endswith(PER_MICRO_BATCH):
                continue
            if key.startswith("vl-dac/") or key in ("loss", "grad_norm"):
                assert second[key] == pytest.approx(first[key], rel=2e-3, abs=1e-4), (name, key)
                checked += 1
    assert checked > 30
