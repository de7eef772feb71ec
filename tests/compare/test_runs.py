"""The key of a run changes with what determines its numbers and with nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trl_ext.compare.recipe import Arm, Recipe
from trl_ext.compare.runs import Prepared, Run, list_runs


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"identity": {"settings": {"beta": 0.1}, "plugins": [], "versions": {"trl": "1.16.0"}}},
        {"identity": {"settings": {"beta": 0.0}, "plugins": ["gdpo"], "versions": {"trl": "1.16.0"}}},
        {"identity": {"settings": {"beta": 0.0}, "plugins": [], "versions": {"trl": "1.15.0"}}},
    ],
    ids=str,
)
def test_the_key_changes_with_what_determines_the_numbers(change: dict[str, Any], run: Run) -> None:
    assert dataclasses.replace(run, **change).key != run.key


def test_the_key_does_not_change_with_names_and_places(run: Run, tmp_path: Path) -> None:
    assert dataclasses.replace(run, arm="baseline", folder="elsewhere").key == run.key
    reordered = {"versions": {"trl": "1.16.0"}, "plugins": [], "settings": {"beta": 0.0}}
    assert dataclasses.replace(run, identity=reordered).key == run.key


def test_runs_come_seed_by_seed() -> None:
    recipe = Recipe("r", "r.yaml", {}, {"a": Arm(), "b": Arm(plugins={"gdpo": {}})}, (3, 5), (), task="tiny")
    prepared = Prepared("grpo", {"a": {"beta": 0.1}, "b": {}}, {"a": {"x": 1}, "b": {"x": 2}}, None, False)
    runs = list_runs(recipe, prepared, Path("out"))
    assert [str(run) for run in runs] == ["a, seed 3", "b, seed 3", "a, seed 5", "b, seed 5"]
    assert runs[0].settings == {"beta": 0.1} and runs[1].plugins == {"gdpo": {}} and runs[0].task == "tiny"
    assert len({run.key for run in runs}) == 4
    assert runs[2].file(".log") == Path("out") / f"a-5-{runs[2].key[:10]}.log"
