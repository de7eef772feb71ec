"""The recipes of the repository: what they say holds, their results are of them, and the table shows the results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext import lab
from trl_ext.catalog import find
from trl_ext.cli import main
from trl_ext.compare import recipe as recipes

ROOT = Path(__file__).parents[2]
TINY = sorted((ROOT / "recipes" / "tiny").glob("*.yaml"))


def table_module() -> Any:
    spec = importlib.util.spec_from_file_location("recipes_table", ROOT / "recipes" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_a_tiny_recipe_expects_something_of_a_task_and_has_a_headline(file: Path) -> None:
    found = recipes.read(str(file))
    assert found.task is not None and lab.task(found.task).summary
    assert found.claim and found.paper
    assert any(metric.expect for metric in found.metrics) and len(found.seeds) >= 6
    assert found.seconds_per_run is not None
    assert f"#   trl_ext compare {file.stem}\n" in file.read_text()


@pytest.mark.parametrize("file", TINY, ids=lambda file: file.stem)
def test_its_result_is_committed_and_of_this_recipe(file: Path) -> None:
    """Whether or not it is as expected: results that are not stay in the table, and their recipe says why."""
    committed = file.parent / "results" / f"{file.stem}.json"
    assert committed.exists(), f"run `make experiments`, or trl_ext compare {file.name} --record {committed}"
    found, asked = json.loads(committed.read_text()), recipes.read(str(file))
    assert found["command"] in (f"trl_ext compare recipes/tiny/{file.name}", f"trl_ext compare {file.stem}")
    assert (found["claim"], found["paper"]) == (asked.claim, asked.paper)
    assert found["task"] == (asked.task or "").removeprefix(f"{ROOT}/")
    assert found["seeds"] == list(asked.seeds) and list(found["arms"]) == list(asked.arms)
    for name, arm in asked.arms.items():
        settings = found["settings"] | found["arms"][name]["settings"]
        wanted = {k: v for k, v in (asked.settings | arm.settings).items() if k not in ("seed", "output_dir")}
        assert settings == settings | wanted
        plugins = [find.find(reference)[0].name for reference in arm.plugins]
        assert sorted(plugin["name"] for plugin in found["arms"][name]["plugins"]) == sorted(plugins)
    assert [metric["label"] for metric in found["metrics"]] == [metric.label for metric in asked.metrics]
    expectations = [entry for metric in found["metrics"] for entry in metric["expectations"]]
    assert [len(metric["expectations"]) for metric in found["metrics"]] == [len(m.expect) for m in asked.metrics]
    assert found["complete"] and found["met"] == all(entry["met"] for entry in expectations)
    stated = [expectation for metric in asked.metrics for expectation in metric.expect]
    problems = [wrongly_stated(entry, given) for entry, given in zip(expectations, stated, strict=True)]
    assert not any(problems), [problem for problem in problems if problem]
    assert len(committed.read_text()) < 50_000


def wrongly_stated(entry: dict[str, Any], stated: recipes.Expectation) -> str | None:
    """Says what is wrong with the statement of a recipe about an expectation, or None."""
    text = entry["text"]
    if entry["met"] is None:
        return f"{text}: not judged"
    if entry["met"]:
        return None if stated.met else f"{text}: recorded as not met, but it is. Leave out `met: false`."
    if stated.met:
        return f"{text}: not met. Add `met: false` and a `reason` to the recipe."
    same = entry.get("reason") == stated.reason
    return None if same else f"{text}: the result has another reason. Compare again, which repeats no run."


@pytest.mark.parametrize(
    ("met", "recorded", "stated", "problem"),
    [
        (True, None, None, None),
        (False, "noisy", "noisy", None),
        (True, "noisy", "noisy", "recorded as not met, but it is"),
        (False, None, None, "Add `met: false` and a `reason`"),
        (False, None, "noisy", "another reason"),
        (None, "noisy", "noisy", "not judged"),
    ],
)
def test_a_result_that_does_not_come_out_is_stated(
    met: bool | None, recorded: str | None, stated: str | None, problem: str | None
) -> None:
    asked = recipes.Expectation(arm="a", claim="better", against="b", met=stated is None, reason=stated)
    entry = {"text": "a better than b", "met": met} | ({"reason": recorded} if recorded else {})
    said = wrongly_stated(entry, asked)
    assert said is None if problem is None else problem in (said or "")


def test_results_name_no_folder_of_the_machine_that_made_them() -> None:
    for file in (ROOT / "recipes" / "tiny" / "results").glob("*.json"):
        assert not re.findall(r'"/[^"]*"', file.read_text()), file.name


def test_every_result_has_a_recipe() -> None:
    results = {file.stem for file in (ROOT / "recipes" / "tiny" / "results").glob("*.json")}
    assert results == {file.stem for file in TINY}


def test_the_table_is_that_of_the_results() -> None:
    table = table_module()
    text = table.README.read_text()
    assert table.BEGIN + table.table(table.load()) + table.END in text, "run `python recipes/table.py`"


def test_the_table_names_what_went_wrong() -> None:
    (result, *_) = table_module().load()
    result["metrics"][0]["expectations"][0]["met"] = False
    result["arms"]["plain"]["failed"] = [{"seed": 2, "status": "crashed", "error": "e"}]
    result["metrics"][0]["expectations"][0]["reason"] = "too loud"
    text = table_module().table([result])
    for page in (text, table_module().details(result)):
        assert ", recorded as not met: too loud" in page
    assert "**no**" in text and "**plain, seed 2: crashed**" in text and result["paper"] in text
    assert "**This did not hold.**" in table_module().details(result)


def test_the_example_of_the_guide_is_a_recipe(tmp_path: Path) -> None:
    guide = (ROOT / "recipes" / "README.md").read_text()
    block = guide.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "guide.yaml").write_text(block)
    found = recipes.read(str(tmp_path / "guide.yaml"))
    assert set(yaml.safe_load(block)["experiment"]) == set(recipes.Experiment.model_fields)  # it shows every key
    assert len(found.arms) == 4 and len(found.metrics) == 2
    for word in ("steps_down_to", "final", "`mean`, `max`, `min`", "identical", "not worse", "within", "apart", "by:"):
        assert word in guide


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["compare", "--help"])
    text = capsys.readouterr().out
    for word in ("trl_ext compare gdpo\n", "--seeds 2", "--json", "experiment:", "Exit code 0", "compare.html"):
        assert word in text
    example = text.partition("two blocks more:\n")[2].partition("\n`trl_ext recipes` also")[0]
    assert set(yaml.safe_load(example)["experiment"]) <= set(recipes.Experiment.model_fields)
