"""`trl_ext recipes`: the list from the files, and the files themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext.catalog import recipes as shipped
from trl_ext.cli import main, recipes


def test_the_list_holds_what_the_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert list(entries) == list(shipped.recipes())
    for entry in entries.values():
        experiment = yaml.safe_load(Path(entry["path"]).read_text()).get("experiment", {})
        assert entry["about"] == experiment.get("about", experiment.get("claim"))
        assert entry["seconds_per_run"] == experiment.get("seconds_per_run")
    assert entries["gdpo"]["plugins"] == ["gdpo"] and entries["gdpo"]["runs"] == 20 and entries["gdpo"]["held"] is True
    assert entries["hdpo-otc"]["plugins"] == ["hdpo", "otc"]  # and not the file of its penalty
    assert entries["gdpo-paper"]["held"] is None and entries["minigrid-view"]["plugins"] == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_is_folded_at_the_width_and_loses_no_word(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= width or " " not in line.strip() for line in shown.splitlines())
    words = " ".join(shown.split())
    for entry in recipes.listing():
        assert entry["about"] in words and f"{entry['name']} " in shown
    assert "tiny, plugins hdpo and otc, about " in words and "paper, plugin gdpo, time not measured" in words
    assert "reach the goal more often (expected, no result is recorded)" in words


def test_time_is_that_of_all_runs_on_this_machine() -> None:
    entry: dict[str, Any] = {"seconds_per_run": 30.0, "runs": 20}
    assert recipes._time(entry, 2) == "about 5 min (20 runs)" and recipes._time(entry, 64) == "about 30 s (20 runs)"


def test_a_result_that_was_not_as_expected_is_told() -> None:
    entry: dict[str, Any] = {"about": "a is better", "held": False, "kind": "tiny"}
    assert recipes._shows(entry) == "NOT AS EXPECTED: a is better"


def test_a_recipe_can_be_copied(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", "gdpo"]) == 0
    assert capsys.readouterr().out == Path(shipped.locate("gdpo")).read_text()
    assert main.main(["recipes", "gdpo", "--path"]) == 0
    assert capsys.readouterr().out == shipped.locate("gdpo") + "\n"
    assert main.main(["recipes", "--path"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "warmup" / "thinkless.py").is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gdpp"], ["no recipe is called 'gdpp'", "Did you mean 'gdpo'"]),
        (["gdpo", "--json"], ["--json prints the whole list", "Leave out the name"]),
    ],
)
def test_wrong_use(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["recipes", *argv]) == 2
    errors = capsys.readouterr().err
    assert all(word in errors for word in words)
