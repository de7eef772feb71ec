"""One process and two agree: groups that lie on both, statistics of all rows, metrics, state and chosen rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import processes

SCRIPT = Path(__file__).parent / "scripts" / "processes.py"
STRADDLING = ("asks", "gdpo", "gdpo-tokens", "shared-prefix", "token-wise", "rloo", "thinkless", "resumed", "formed")
STEPS = ("steps", "steps-shared")
LOSSES = ("p3o", "p3o-rloo", "trpa", "reg-grpo")
WHOLE = ("whole-grpo", "whole-rloo", *LOSSES)
Report = dict[str, Any]


def here(model: str, folder: Path, script: Path = SCRIPT, *only: str) -> Report:
    """What one process, this one, writes down."""
    spec = importlib.util.spec_from_file_location(f"{script.stem}_script", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(model, folder, *only)


def two_processes(model: str, folder: Path, script: Path = SCRIPT, *only: str, count: int = 2) -> list[Report]:
    """Runs a script on two processes, or on `count`, with gloo, and returns what each of them wrote down."""
    processes.launch(count, script, model, str(folder), *only)
    return [json.loads((folder / f"report-{count}-{rank}.json").read_text()) for rank in range(count)]


def test_one_and_two_processes_agree(model: str, tmp_path: Path) -> None:
    one, two = here(model, tmp_path), two_processes(model, tmp_path)
    assert [report["world"] for report in (one, *two)] == [1, 2, 2]
    for name in (*STRADDLING, *STEPS):
        same_rounds(name, one[name], [report[name] for report in two])
    same_rows("grown", one["grown"], [report["grown"] for report in two])
    for name in (*STRADDLING, *LOSSES, "grown"):
        same_metrics(name, one[name], two[0][name])
    for name in (*STRADDLING, *WHOLE, *STEPS, "grown"):
        same_parameters(name, tmp_path)
    stopped_together(two)
    same_steps(one, two)
    errors_everywhere(two)
    same_answers(one["asks"], [report["asks"] for report in two])
    resumed_exactly(one, two, tmp_path)
    for name in WHOLE:
        whole_groups(one[name], [report[name] for report in two])
    # the comparison can fail: another method on the same rows has other numbers
    assert one["gdpo"]["advantages"][0] != pytest.approx(one["token-wise"]["advantages"][0], abs=1e-2)


@pytest.mark.slow
def test_groups_on_three_processes(model: str, tmp_path: Path) -> None:
    one, three = here(model, tmp_path, SCRIPT, "groups"), two_processes(model, tmp_path, SCRIPT, "groups", count=3)
    formed, grown = ("formed", "formed-rloo"), ("grown", "grown-dapo", "grown-rloo")
    for name in formed:
        same_rounds(name, one[name], [report[name] for report in three])
    for name in grown:
        same_rows(name, one[name], [report[name] for report in three])
    for name in (*formed, "grown", "grown-rloo"):
        same_metrics(name, one[name], three[0][name])
    for name in (*formed, *grown):
        same_parameters(name, tmp_path, parts=("3-0", "3-1", "3-2"))
    stopped_together(three)


@pytest.mark.slow
def test_three_processes_take_the_same_steps(model: str, tmp_path: Path) -> None:
    one = here(model, tmp_path, SCRIPT, "steps")
    three = two_processes(model, tmp_path, SCRIPT, "steps", count=3)
    for name in STEPS:
        same_rounds(name, one[name], [report[name] for report in three])
        same_parameters(name, tmp_path, parts=("3-0", "3-1", "3-2"))
    same_steps(one, three)
    errors_everywhere(three)


def same_steps(one: Report, several: list[Report]) -> None:
    """Statistics of whole steps and terms of rows that lie on some processes only, in training and in evaluation."""
    for name in STEPS:
        values = []
        for report in (one, *several):
            logged = [entry for entry in report[name]["metrics"] if "steps/kl" in entry]
            values.append([entry[f"steps/{key}"] for entry in logged for key in ("kl", "side", "trust")])
            assert len(logged) == 4 and 0 < logged[0]["steps/tokens_kept"] < 1
        for found in values[1:]:
            assert found == pytest.approx(values[0], abs=1e-5), name
        assert values[0][1] > 1 and abs(values[0][3]) > 1e-4  # the second step has moved
    evaluated = [report["steps"]["metrics"][-1] for report in (one, *several)]
    for key in ("eval_steps/kl", "eval_steps/side"):  # transformers takes the loss from the first processes only
        assert [entry[key] for entry in evaluated] == pytest.approx([evaluated[0][key]] * len(evaluated), abs=1e-5)
    assert evaluated[0]["eval_steps/side"] > 1


def errors_everywhere(several: list[Report]) -> None:
    """A wrong answer of the last process stops all of them, and each says which hook of which plugin gave it."""
    last = len(several) - 1
    expected = {
        "other-advantages": f"plugin 'other-advantages' returned other values from 'advantages' on process {last} than",
        "other-shape": f"per row from 'advantages' on process 0 and one advantage per token on process {last}",
        "other-rows": f"plugin 'other-rows' returned other values from 'keep_rows' on process {last} than on process 0",
        "no-mask": "plugin 'no-mask' returned list from 'token_mask', expected booleans",
        "other-fields": f"the fields here from 'side_batch' on process 0 and none on process {last}",
        "no-rows": "plugin 'no-rows' returned the completion [] in row 0 from 'side_batch'",
    }
    for process, report in enumerate(several):
        assert report["errors"].keys() == expected.keys()
        for name, text in expected.items():
            assert text in report["errors"][name], report["errors"][name]
        told = report["errors"]["no-rows"].startswith(f"stopped with process {last}, which said: ")
        assert told == (process != last)


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


def same_rows(name: str, one: Report, two: list[Report]) -> None:
    """The rows that a rollout added, whatever filled up the processes."""
    assert len(one["gathered"][0]) == 21, name  # of 12 prompts
    for report in two:
        assert report["gathered"] == one["gathered"], name
        assert report["lengths"] == one["lengths"], name
        for found, expected in zip(report["advantages"], one["advantages"], strict=True):
            assert found == pytest.approx(expected, abs=1e-5) and any(expected), name
        assert report["logged"] == pytest.approx(one["logged"], abs=1e-5), name


def stopped_together(reports: list[Report]) -> None:
    """Checks that a wrong answer of the last process stops all of them, and names plugin, hook and process."""
    last, failing = len(reports) - 1, reports[-1]
    for where, own in (
        ("select-type", "PluginError: plugin 'one-differs' returned int from 'select_rows', expected a list"),
        ("select-raises", "ZeroDivisionError: by nothing"),
        ("rollout-short", "PluginError: plugin 'one-differs' returned 0 completions from 'rollout', expected"),
    ):
        assert failing[where].startswith(own)
        for report in reports[:-1]:
            assert report[where].startswith(
                f"PluginError: stopped with process {last}, which said: {own.removeprefix('PluginError: ')}"
            )
    for where, hook in (("select-differs", "select_rows"), ("rewards-differ", "rewards")):
        for report in reports:
            assert f"from '{hook}' on process {last} than on process 0" in report[where]


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
            assert second["fixed/rank"] in (0.5, 1.0) and second["fixed/only_1"] == second["fixed/only_0"] == 2.0
        for key in first.keys() & second.keys():
            # a process shares what its own rows have in common
            local = ("shared-prefix/", "fixed/rank")
            if key.startswith(local):
                continue
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-4), (name, key)
            checked += 1
    assert checked > 30


def same_parameters(name: str, folder: Path, parts: tuple[str, ...] = ("2-0", "2-1")) -> None:
    one, first, *others = (torch.load(folder / f"{name}-{part}.pt") for part in ("1-0", *parts))
    for key, value in one.items():
        assert all(torch.equal(first[key], other[key]) for other in others), (name, key)
        torch.testing.assert_close(first[key], value, atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")


def resumed_exactly(one: Report, two: list[Report], folder: Path) -> None:
    """Steps 2 and 3 again, from the checkpoint after step 1, with the plugins' state on every process."""
    for report in (one, *two):
        assert report["resumed"]["rows"] == report["gdpo"]["rows"][1:]
        assert report["resumed"]["advantages"] == report["gdpo"]["advantages"][1:]
    # p3o has running moments and a reference of its own
    pairs = (("gdpo", "resumed"), ("formed", "formed-resumed"), ("p3o", "p3o-resumed"), ("steps", "steps-resumed"))
    for pair in pairs:
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
