"""Data and reward functions as `trl_ext train` finds them, checked before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_ext import ConfigError
from trl_ext.catalog import find
from trl_ext.train import preflight
from trl_ext.trl_internals import arguments

from ..refusals import refused
from .conftest import write_rows

ROW: dict[str, Any] = {"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 8,
}


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would go to the process in which reward functions are tried."""
    calls: list[dict[str, Any]] = []

    def record(paths: Any, rows: Any, state: Any, warn: Any, unknown: Any) -> None:
        calls.append({"paths": paths, "rows": rows, "state": state, "unknown": unknown})

    monkeypatch.setattr(preflight, "try_in_own_process", record)
    return calls


@pytest.fixture
def check(tmp_path: Path, tried: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`check(splits, rewards=..., plugins=..., kind=..., **settings)` checks a run on a folder with these splits."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(
        splits: dict[str, list[dict[str, Any]]] | None = None,
        rewards: list[str] | None = None,
        plugins: dict[str, Any] | None = None,
        kind: Any = "grpo",
        look: bool = True,
        **settings: Any,
    ) -> None:
        folder = write_rows(tmp_path / "data", **({"train": [ROW] * 16} if splits is None else splits))
        values = {**SETTINGS, "dataset_name": folder, "output_dir": str(tmp_path), **settings}
        if kind == "dpo":
            values = {name: value for name, value in values.items() if "num_gen" not in name and "compl" not in name}
        else:
            values["reward_funcs"] = ["trl_ext.testing.digits"] if rewards is None else rewards
        parsed = arguments.parse(kind, [], values)
        preflight.check(kind, parsed, find.resolve(plugins or {}), pytest.fail, rewards=look)

    return run


# --- splits and rows ---


def test_a_missing_evaluation_split(check: Any) -> None:
    with refused(ConfigError, "no split 'test'; there is 'train'", "eval_strategy='steps'", "--dataset_test_split"):
        check(eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("change", [{"dataset_test_split": "train"}, {"eval_strategy": "no"}])
def test_the_ways_out_of_a_missing_evaluation_split(change: dict[str, Any], check: Any) -> None:
    check(**{"eval_strategy": "epoch"} | change)


def test_a_mixture_without_an_evaluation_split(check: Any, tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "part", train=[ROW] * 40)
    mixture = {"dataset_name": None, "datasets": [{"path": folder}], "eval_strategy": "epoch"}
    with refused(ConfigError, "no split 'test'", "--test_split_size"):
        check(**mixture)


def test_a_missing_training_split(check: Any) -> None:
    with refused(ConfigError, "no split 'training'; there is 'train'", "--dataset_train_split"):
        check(dataset_train_split="training")


def test_an_evaluation_at_the_start_without_evaluations(check: Any) -> None:
    with refused(ConfigError, "eval_on_start=True", "eval_strategy='no'", "--eval_strategy steps"):
        check(eval_on_start=True)


@pytest.fixture
def other_columns(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`other_columns(**row)` makes evaluation data of such rows; a folder of files has the same columns everywhere."""

    def replace(**row: Any) -> None:
        splits = {"train": Dataset.from_list([ROW] * 16), "test": Dataset.from_list([row])}
        monkeypatch.setattr(arguments, "load_splits", lambda parsed: splits)

    return replace


def test_evaluation_data_are_looked_at_too(check: Any, other_columns: Any) -> None:
    other_columns(question="1")
    with refused(ConfigError, "the evaluation data has no column 'prompt'"):
        check(eval_strategy="epoch")


def test_evaluation_data_without_the_column_of_a_reward(check: Any, other_columns: Any, tmp_path: Path) -> None:
    other_columns(prompt="1")
    path = reward_module(tmp_path, "completions, answer, **rest")
    with refused(ConfigError, ".reward' takes 'answer'", "The evaluation data has no such column; it has prompt"):
        check(rewards=[path], eval_strategy="epoch")


def test_data_that_cannot_be_loaded_say_why(check: Any) -> None:
    with refused(ConfigError, "the training data cannot be loaded: DatasetGenerationError", "column names don't match"):
        check({"train": [ROW], "test": [{"question": "1"}]})


def test_too_few_prompts(check: Any) -> None:
    with refused(ConfigError, "has 16 prompts, and a round takes 32"):
        check(gradient_accumulation_steps=16)


def test_pairs(check: Any, tried: Any) -> None:
    with refused(ConfigError, "the training data has no column 'chosen', which the DPO trainer needs"):
        check(kind="dpo")
    assert tried == []


# --- reward functions ---


def test_a_column_that_a_reward_of_trl_takes(check: Any) -> None:
    with refused(ConfigError, "'accuracy_reward' takes 'solution'", "it has prompt, answer", "--no_reward_check"):
        check(rewards=["accuracy_reward", "think_format_reward"])


def test_rewards_of_trl_without_columns(check: Any, tried: Any) -> None:
    check(rewards=["think_format_reward", "get_soft_overlong_punishment"])
    assert tried == []  # TRL's own are not tried


def test_columns_that_are_there(check: Any, tried: Any) -> None:
    check({"train": [{**ROW, "solution": "2"}] * 16}, ["accuracy_reward", "trl_ext.testing.digits"])
    assert tried[0]["paths"] == ["trl_ext.testing.digits"]


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_named_like_an_argument(name: str, check: Any) -> None:
    with refused(ConfigError, f"the training data has a column {name!r}", "Rename the column"):
        check({"train": [{**ROW, name: "x"}] * 16})


def reward_module(tmp_path: Path, parameters: str) -> str:
    name = f"rewards_with_{abs(hash(parameters))}"
    (tmp_path / f"{name}.py").write_text(f"def reward({parameters}):\n    raise AssertionError('not here')")
    return f"{name}.reward"


def test_a_column_that_the_trainer_would_replace(check: Any, tmp_path: Path) -> None:
    path = reward_module(tmp_path, "completions, trainer_state, **rest")
    with refused(ConfigError, "a column 'trainer_state'"):
        check({"train": [{**ROW, "trainer_state": "TX"}] * 16}, [path])


def test_columns_of_other_names_are_no_trouble(check: Any) -> None:
    check({"train": [{**ROW, "completion": "x", "environments": "y", "trainer_state": "z"}] * 16})


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ("prompt, completions, **rest", "The trainer passes 'prompts'"),
        ("completion, **rest", "The trainer passes 'completions'"),
        ("environments, **rest", "Nothing gives the trainer an `environment_factory`"),
        ("*, gold, **rest", "has no such column; it has prompt, answer"),
    ],
)
def test_parameters_that_nobody_passes(parameters: str, words: str, check: Any, tmp_path: Path) -> None:
    with refused(ConfigError, "which the trainer will not pass", words, "--no_reward_check"):
        check(rewards=[reward_module(tmp_path, parameters)])


def test_parameters_with_a_default_are_left_alone(check: Any, tmp_path: Path) -> None:
    check(rewards=[reward_module(tmp_path, "completions, gold=None, **rest")])


def test_columns_that_trl_drops(check: Any, tmp_path: Path) -> None:
    path = reward_module(tmp_path, "completions, answer, **rest")
    check(rewards=[path])
    (tmp_path / "data" / "train.jsonl").unlink()
    (tmp_path / "data").rmdir()
    with refused(ConfigError, "takes 'answer'", "remove_unused_columns=True drops it", "--remove_unused_columns false"):
        check(rewards=[path], remove_unused_columns=True)


def test_columns_that_a_plugin_needs_are_not_dropped(check: Any, tmp_path: Path) -> None:
    path = reward_module(tmp_path, "completions, answer, **rest")
    check(rewards=[path], plugins={"spae": {"prober": "json:dumps"}}, remove_unused_columns=True)


def test_no_reward_check_leaves_all_of_this_out(check: Any, tried: Any) -> None:
    check(rewards=["accuracy_reward"], look=False)
    assert tried == []


PLUGIN = """
from trl_ext_hooks import Plugin, hookimpl

class Brings(Plugin):
    name, trainers, fields = "brings", ("grpo",), ("found",)

class Plays(Plugin):
    name, trainers = "plays", ("grpo",)

    @hookimpl
    def trainer_arguments(self):
        return {"environment_factory": object}
"""


def test_what_plugins_bring(check: Any, tried: Any, tmp_path: Path) -> None:
    (tmp_path / "brings.py").write_text(PLUGIN)
    found, played = (reward_module(tmp_path, f"{name}, **rest") for name in ("found", "environments"))
    check(rewards=[found, played], plugins={"brings:Brings": None, "brings:Plays": None})
    assert tried[0]["unknown"] == {"found"}


# --- what the process gets ---


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({}, 8),
        ({"per_device_train_batch_size": 4}, 4),  # one group per call
        ({"gradient_accumulation_steps": 8}, 8),  # 64 rows per call, of which two groups are enough
        ({"num_generations": 8}, 8),
    ],
)
def test_whole_groups_as_in_training(settings: dict[str, Any], rows: int, check: Any, tried: Any) -> None:
    numbered = [{**ROW, "answer": str(i)} for i in range(16)]
    check({"train": numbered}, **settings)
    group = settings.get("num_generations", 4)
    assert [row["answer"] for row in tried[0]["rows"]] == [str(i // group) for i in range(rows)]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"num_train_epochs": 2}, 16),  # rounds of 2 prompts
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 2}, 8),
        ({"num_train_epochs": 1, "num_iterations": 3}, 24),
        ({"num_train_epochs": 0.5}, 4),
        ({"max_steps": 3, "dataset_streaming": True}, 3),
    ],
)
def test_the_state_of_the_trainer(settings: dict[str, Any], steps: int, check: Any, tried: Any) -> None:
    check(**settings)
    assert tried[0]["state"]["max_steps"] == steps


def test_the_steps_are_those_that_transformers_counts(build: Any) -> None:
    from trl_ext.trl_internals.steps import planned_steps

    data = Dataset.from_list([ROW] * 10)
    settings = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "num_iterations": 2}
    trainer = build(data=data, per_device_train_batch_size=4, **settings)
    trainer.train()
    assert trainer.state.max_steps == planned_steps("grpo", trainer.args, 10)


def test_every_reward_function_has_a_weight(check: Callable[..., None]) -> None:
    with refused(ConfigError, "reward_weights has 2 numbers, and there are 1 reward functions."):
        check(reward_weights=[1.0, 0.5])


@pytest.mark.parametrize(
    ("weights", "plugins"), [([0.5], {}), ([1.0, 0.5], {"tools": {"functions": ["trl_ext.tools.calculator"]}})]
)
def test_as_many_weights_as_there_may_be_rewards(weights: Any, plugins: Any, check: Any, tried: Any) -> None:
    check(reward_weights=weights, plugins=plugins)  # an environment may bring one more
