"""`trl_ext schema`: a JSON Schema of the YAML file of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext.cli import main

from ..json_schema import problems

ROOT = Path(__file__).parents[2]
RECIPES = sorted([*ROOT.glob("recipes/**/*.yaml"), ROOT / "trl_ext" / "train" / "demo" / "default.yaml"])


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    import contextlib
    import io

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main.main(["schema"]) == 0
    return json.loads(output.getvalue())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_recipe_fits(file: Path, schema: dict[str, Any]) -> None:
    assert problems(yaml.safe_load(file.read_text()), schema, schema) == []


def test_it_is_a_valid_schema(schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("plugin: {gdpo: {}}", "there is no 'plugin'"),
        ("learning_rat: 1", "there is no 'learning_rat'"),
        ("learning_rate: fast", ".learning_rate: 'fast'"),
        ("loss_type: grop", ".loss_type: 'grop'"),
        ("save_strategy: setps", ".save_strategy: 'setps'"),
        ("reward_funcs: accuracy_reward", ".reward_funcs: 'accuracy_reward'"),
        ("datasets: [{pat: a}]", ".datasets[0]: 'path' is missing"),
        ("plugins: {gdop: {}}", ".plugins: there is no 'gdop'"),
        ("plugins: {gdpo: {grup_eps: 1}}", ".plugins.gdpo: there is no 'grup_eps'"),
        ("plugins: {gdpo: {group_eps: 0}}", ".plugins.gdpo.group_eps: 0 is out of bounds"),
        ("plugins: {gdpo: {conditions: [{target: a}]}}", ".plugins.gdpo.conditions[0]: 'given' is missing"),
        ("experiment: {seed: 3}", ".experiment: there is no 'seed'"),
        ("trainer: ppo", ".trainer: 'ppo'"),
        ("no_save: please", ".no_save: 'please'"),
        ("num_processes: two", ".num_processes: 'two'"),
    ],
)
def test_mistakes_are_seen(text: str, wrong: str, schema: dict[str, Any]) -> None:
    found = problems(yaml.safe_load(text), schema, schema)
    assert any(wrong in problem for problem in found), found


def test_what_works_fits(schema: dict[str, Any]) -> None:
    text = """
    learning_rate: 1e-6
    loss_type: [sigmoid, sft]
    fsdp: true
    num_processes: 2
    accelerate_config: zero2
    env: {A: 1}
    inspect: 2
    plugins: {gdpo: , vl_dac: {}, mine.py: {any: 1}, 'my.module:Plugin': {}}
    """
    assert problems(yaml.safe_load(text), schema, schema) == []


def test_options_come_with_help_and_defaults(schema: dict[str, Any]) -> None:
    properties = schema["properties"]
    assert "learning rate" in properties["learning_rate"]["description"]
    assert properties["learning_rate"]["default"] == 1e-6
    assert "processes" in properties["num_processes"]["description"]
    assert "gdpo" in properties["plugins"]["properties"]
    option = schema["$defs"]["plugin.gdpo"]["properties"]["group_eps"]
    assert option["default"] == 1e-4 and option["exclusiveMinimum"] == 0 and option["description"]
    assert "2601.05242" in schema["$defs"]["plugin.gdpo"]["description"]


def test_of_one_trainer(capsys: Any) -> None:
    assert main.main(["schema", "dpo"]) == 0
    properties = json.loads(capsys.readouterr().out)["properties"]
    assert "label_smoothing" in properties and "num_generations" not in properties
