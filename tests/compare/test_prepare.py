"""Mistakes that need TRL to be seen, and folders that cannot be written: told in a sentence, with exit code 2."""

from __future__ import annotations

from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from trl_ext.compare import prepare
from trl_ext.compare.recipe import read

from .conftest import METRIC, file_size_limit, records


@pytest.fixture
def refused(compare: Any, recipe: Any, tmp_path: Path) -> Any:
    """`refused(...)` takes a recipe that cannot work and returns the error; no run may have been started."""

    def run(*args: Any, **kwargs: Any) -> str:
        code, output, errors = compare(recipe(*args, **kwargs), "--output", "out")
        assert code == 2 and not output, errors
        assert "Traceback" not in errors and not list((tmp_path / "out/runs").iterdir())
        return str(errors[errors.index("error: ") :])

    return run


def two(**second: Any) -> dict[str, Any]:
    return {"arms": {"plain": None, "other": second}}


@pytest.mark.parametrize(
    ("experiment", "settings", "words"),
    [
        ({"task": "mods"}, {}, ["no task is called 'mods'", "Did you mean 'modes'?"]),
        ({"task": None}, {}, ["neither on what to train nor which model", "experiment: {task: NAME}", "loud-quiet"]),
        ({"task": "loud-quiet", "trainer": "dpo"}, {}, ["task 'loud-quiet' is not for dpo. It is for grpo, rloo"]),
        ({"trainer": "rloo"}, {}, ["plugin 'gdpo' cannot serve the RLOO trainer"]),
        ({}, {"learning_rat": 1}, ["TRL's GRPO has no setting 'learning_rat'", "Did you mean 'learning_rate'?"]),
        ({}, {"num_processes": 2}, ["TRL's GRPO has no setting 'num_processes'"]),
        ({}, {"model_name_or_path": "x"}, ["brings its own model, data and rewards", "model_name_or_path='x'"]),
        ({}, {"reward_funcs": ["accuracy_reward"]}, ["brings its own model", "reward_funcs=['accuracy_reward']"]),
        ({}, {"learning_rate": "fast"}, ["learning_rate", "invalid float value: 'fast'"]),
        ({}, {"num_generations": 3}, ["TRL refuses these settings", "divisible"]),
        (two(plugins=["gdop"]), {}, ["no plugin is called 'gdop'", "Did you mean 'gdpo'"]),
        (two(plugins={"gdpo": {"grup_eps": 1}}), {}, ["no option 'grup_eps'", "Did you mean 'group_eps'?"]),
        (two(), {}, ["arms 'plain' and 'other' differ in nothing"]),
        (two(settings={"learning_rate": 1e-2}), {}, ["arms 'plain' and 'other' differ in nothing"]),
        (two(settings={"temperature": 1.0}), {}, ["arms 'plain' and 'other' differ in nothing"]),  # TRL's default
        (two(settings={"bta": 1.0}), {}, ["arm 'other': TRL's GRPO has no setting 'bta'", "Did you mean 'beta'"]),
        (
            two(plugins={"gdpo": {"conditions": [{"target": "lenght", "given": "short"}]}}),
            {},
            ["arm 'other'", "no reward function is called 'lenght'. Known: digits, short. Correct gdpo.conditions."],
        ),
    ],
    ids=str,
)
def test_refused_before_the_first_run(
    experiment: dict[str, Any], settings: dict[str, Any], words: list[str], refused: Any
) -> None:
    text = refused(experiment, **settings)
    assert all(word in text for word in words), text


@pytest.mark.slow
def test_an_unknown_metric_stops_early_and_costs_nothing_twice(recipe: Any, compare: Any, tmp_path: Path) -> None:
    wrong = METRIC | {"name": "rewards/digit/mean"}
    code, _, errors = compare(recipe({"metrics": [wrong]}, max_steps=100), "--output", "long")
    assert code == 2, errors
    assert "no metric called 'rewards/digit/mean' is logged by arm" in errors
    assert "Did you mean 'rewards/digits/mean'" in errors and not records(tmp_path / "long")
    wrong = METRIC | {"name": "eval_rewards/digits/mean"}  # known only when a run has ended
    code, _, errors = compare(recipe({"metrics": [wrong]}), "--output", "out", "--jobs", 1)
    assert code == 2 and "no metric called 'eval_rewards/digits/mean'" in errors
    assert len(records(tmp_path / "out")) == 1
    code, _, errors = compare(recipe({"metrics": [wrong]}), "--output", "out")
    assert code == 2 and "no metric called 'eval_rewards/digits/mean'" in errors
    assert len(records(tmp_path / "out")) == 1  # told before another run
    code, _, errors = compare(recipe(), "--output", "out")
    assert code == 0 and "1 of 4 runs are there already" in errors


@pytest.mark.slow
def test_one_seed_runs_without_intervals(recipe: Any, compare: Any) -> None:
    code, output, errors = compare(recipe(), "--output", "out", "--seeds", 1)
    assert code == 0, errors
    assert "note: one seed: there are no intervals and no verdicts" in output and "too few seeds" in output
    assert "[" not in output.partition("note:")[0].partition("interval]")[2]


@pytest.mark.parametrize(("option", "value"), [("--seeds", 0), ("--jobs", 0)])
def test_counts_of_nothing(option: str, value: int, recipe: Any, compare: Any) -> None:
    code, _, errors = compare(recipe(), option, value)
    assert code == 2 and f"{option} {value}: expected a number of at least 1" in errors


def test_an_unwritable_folder(recipe: Any, compare: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below", "/proc/below"):
        code, _, errors = compare(recipe(), "--output", place)
        assert code == 2 and f"cannot write into {place}" in errors and "--output" in errors, errors


def test_a_folder_in_use(recipe: Any, compare: Any, tmp_path: Path) -> None:
    (tmp_path / "out/runs").mkdir(parents=True)
    with FileLock(tmp_path / "out/.lock"):
        code, _, errors = compare(recipe(), "--output", "out")
    assert code == 2 and "another comparison works in out" in errors


@pytest.mark.slow
def test_a_full_disk_stops_the_comparison_and_keeps_what_there_is(recipe: Any, compare: Any, tmp_path: Path) -> None:
    code, _, errors = compare(recipe(), "--output", "out", "--jobs", 1)
    assert code == 0, errors
    kept = sorted((tmp_path / "out/runs").glob("*.json"))
    for file in kept[2:]:
        file.unlink()
    # the process that all runs are forked from
    with file_size_limit(forkserver._forkserver._forkserver_pid, 4000):  # type: ignore[attr-defined]
        code, _, errors = compare(recipe(), "--output", "out", "--jobs", 1)
    assert code == 2 and "File too large" in errors and "Traceback" not in errors, errors
    assert "Runs that have ended are kept" in errors and sorted((tmp_path / "out/runs").glob("*.json")) == kept[:2]
    (tmp_path / "out/compare.html").unlink()
    (tmp_path / "out/compare.html").mkdir()
    code, _, errors = compare(recipe(), "--output", "out")
    assert code == 2 and "cannot write out/compare.html: Is a directory" in errors
    assert len(records(tmp_path / "out")) == 4


@pytest.mark.slow
def test_a_damaged_record_is_named(recipe: Any, compare: Any, tmp_path: Path) -> None:
    compare(recipe(), "--output", "out", "--seeds", 1)
    (file, *_) = sorted((tmp_path / "out/runs").glob("*.json"))
    file.write_text("{")
    code, _, errors = compare(recipe(), "--output", "out", "--seeds", 1)
    assert code == 2 and f"{file.name} is not a record of a run" in errors and "Remove it" in errors


def test_a_plugin_beside_the_recipe_is_recorded_without_the_folders_of_the_machine(
    recipe: Any, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", cache)
    (tmp_path / "mine.py").write_text(
        "from trl_ext_hooks import Plugin, hookimpl\n\n\n"
        "class Mine(Plugin):\n    name, trainers = 'mine', ('grpo',)\n\n"
        "    @hookimpl\n    def advantages(self, round):\n        return None\n"
    )
    path = recipe(two(plugins=["mine.py"]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    prepared = prepare.prepare(read(path), lambda said: None)
    assert prepared.identities["other"]["plugins"][0]["origin"] == "mine.py"
