"""One process and two agree: groups that lie on both, statistics of all rows, metrics, state and chosen rows."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "processes.py"
STRADDLING = ("asks", "gdpo", "gdpo-tokens", "shared-prefix", "token-wise", "rloo", "thinkless", "resumed")
LOSSES = ("p3o", "p3o-rloo", "trpa")
WHOLE = ("whole-grpo", "whole-rloo", *LOSSES)
Report = dict[str, Any]


def here(model: str, folder: Path, script: Path = SCRIPT) -> Report:
    """What one process, this one, writes down."""
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(model, folder)


def two_processes(model: str, folder: Path, script: Path = SCRIPT, count: int = 2) -> list[Report]:
    """What each of two processes wrote down; they really run, under accelerate's launcher with gloo."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", f"{count}", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), model, str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # a collective that one process skips would hang
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"report-{count}-{rank}.json").read_text()) for rank in range(count)]


def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    one, two = here(model, tmp_path), two_processes(model, tmp_path)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in STRADDLING:
        same_rounds(name, one[name], [report[name] for report in two])
    for name in (*STRADDLING, *LOSSES):
        same_metrics(name, one[name], two[0][name])
    for name in (*STRADDLING, *WHOLE):
        same_parameters(name, tmp_path)
    same_answers(one["asks"], [report["asks"] for report in two])
    resumed_exactly(one, two, tmp_path)
    for name in WHOLE:
        whole_groups(one[name], [report[name] for report in two])
    # the comparison can fail: another method on the same rows has other numbers
    assert one["gdpo"]["advantages"][0] != pytest.approx(one["token-wise"]["advantages"][0], abs=1e-2)


def same_rounds(name: str, one: Report, two: list[Report]) -> None:
    """Chosen rows, gathered fields and advantages; two processes hold different parts of padded width."""
    for report in two:
        assert report["rows"] == one["rows"], name
        assert report["lengths"] == one["lengths"] and len(set(one["lengths"][0])) > 1, name
        assert report["gathered"] == one["gathered"] == [list(range(12))] * len(one["gathered"]), name
        for found, expected in zip(report["advantages"], one["advantages"], strict=True):
            assert found == pytest.approx(expected, abs=1e-5), name
        assert report["logged"] == pytest.approx(one["logged"], abs=1e-5), name
    assert all(abs(value) > 0 for value in one["advantages"][0][3:6]), name  # the group that lies on both is no void
    assert two[0]["widths"] != two[1]["widths"], name


@pytest.mark.slow
def test_one_and_three_processes_agree(model: str, tmp_path: Path) -> None:
    one, three = here(model, tmp_path), two_processes(model, tmp_path, count=3)
    same_answers(one["asks"], [report["asks"] for report in three])
    for key, value in torch.load(tmp_path / "asks-1-0.pt").items():
        for rank in range(3):
            other = torch.load(tmp_path / f"asks-3-{rank}.pt")[key]
            torch.testing.assert_close(other, value, atol=1e-5, rtol=0)


def same_answers(one: Report, others: list[Report]) -> None:
    """Greedy completions, their scores and their log-probabilities, asked for by one process or by several."""
    assert [sorted(answers) for answers in one["answers"][:3]] == [["1", "5", "9"], ["0"], []]
    assert all(set(answers) < {"0", "1", "5", "9"} for report in others for answers in report["answers"])
    for number, answers in enumerate(one["answers"]):
        found = {row: answer for report in others for row, answer in report["answers"][number].items()}
        assert found.keys() == answers.keys()
        for row, (ids, scores, logps) in answers.items():
            assert found[row][0] == ids
            assert found[row][1] == pytest.approx(scores, nan_ok=True) and found[row][2] == pytest.approx(
                logps, abs=1e-4
            )


def same_metrics(name: str, one: Report, two: Report) -> None:
    """Sums and counts are added over processes before they are divided."""
    checked = 0
    for first, second in zip(one["metrics"][:-1], two["metrics"][:-1], strict=True):
        if "fixed/rank" in first:  # a step that began with a round
            assert second["fixed/logged_length"] == second["fixed/length"] == first["fixed/logged_length"]
            assert second["fixed/rank"] == 0.5 and second["fixed/only_1"] == second["fixed/only_0"] == 2.0
        for key in first.keys() & second.keys():
            # a process shares what its own rows have in common
            local = ("shared-prefix/", "fixed/rank")
            if key.startswith(local):
                continue
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), (name, key)
            checked += 1
    assert checked > 30


def same_parameters(name: str, folder: Path) -> None:
    one, first, second = (torch.load(folder / f"{name}-{part}.pt") for part in ("1-0", "2-0", "2-1"))
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), (name, key)
        torch.testing.assert_close(first[key], value, atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")


def resumed_exactly(one: Report, two: list[Report], folder: Path) -> None:
    """Steps 2 and 3 again, from the checkpoint after step 1, with the plugins' state on every process."""
    for report in (one, *two):
        assert report["resumed"]["rows"] == report["gdpo"]["rows"][1:]
        assert report["resumed"]["advantages"] == report["gdpo"]["advantages"][1:]
    for pair in (("gdpo", "resumed"), ("p3o", "p3o-resumed")):  # p3o has running moments and a reference of its own
        for part in ("1-0", "2-0", "2-1"):
            whole, resumed = (torch.load(folder / f"{name}-{part}.pt") for name in pair)
            assert all(torch.equal(whole[key], resumed[key]) for key in whole), pair


def whole_groups(one: Report, two: list[Report]) -> None:
    groups = [group for report in two for group in report["groups"]]
    assert all(len(set(group)) == 1 and len(group) == 4 for group in (*groups, *one["groups"]))
    assert {group[0] for group in two[0]["groups"]} == {0, 1, 2} and {group[0] for group in two[1]["groups"]} == {
        3,
        4,
        5,
    }
