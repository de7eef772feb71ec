"""Every task trains with every trainer that it names, and TRL's tool loop really carries calls out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_ext import ConfigError, lab
from trl_ext.lab import WarmUp
from trl_ext.lab.builtin import calculator
from trl_ext.lab.messages import calls_made
from trl_ext.testing import tiny_args
from trl_ext.trl_internals.seams import trainer_class

PAIRS = [
    # with its first trainer in each run of the suite, and with all of them in `make slow`
    pytest.param(name, kind, marks=[] if kind == task.trainers[0] else [pytest.mark.slow])
    for name, task in lab.tasks().items()
    for kind in task.trainers
]


def trainer_of(task: lab.Task, kind: Any, output: Path, **settings: Any) -> Any:
    arguments = lab.trainer_arguments(task, kind, train_size=16, test_size=8, say=lambda line: None)
    if kind != "dpo":
        settings.setdefault("max_completion_length", task.max_completion_length)
    return trainer_class(kind)(args=tiny_args(kind, output, **settings), **arguments)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_every_task_trains(name: str, kind: Any, untrained: Callable[[str], lab.Task], tmp_path: Path) -> None:
    task = untrained(name)
    trainer = trainer_of(task, kind, tmp_path, max_steps=1)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    logged = trainer.state.log_history[0]
    if kind == "dpo":
        assert any(not torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())
        assert "rewards/accuracies" in logged
        return
    assert [f"rewards/{reward.__name__}/mean" in logged for reward in task.rewards] == [True] * len(task.rewards)
    if task.behaviour is not None:
        assert any(key.startswith("behaviour/") for key in logged)


def test_rows_of_a_seed_and_sizes(untrained: Callable[[str], lab.Task]) -> None:
    task = untrained("modes")

    def prompts(**settings: Any) -> list[list[Any]]:
        arguments = lab.trainer_arguments(task, "grpo", say=lambda line: None, **settings)
        return [arguments[name]["prompt"] for name in ("train_dataset", "eval_dataset")]

    assert [len(split) for split in prompts()] == [task.train_size, task.test_size]
    assert [len(split) for split in prompts(train_size=5, test_size=3)] == [5, 3]
    assert prompts(seed=1) == prompts(seed=1) != prompts(seed=2)
    assert "eval_dataset" not in lab.trainer_arguments(task, "grpo", train_size=1, test_size=0, say=lambda line: None)


def test_rows_without_what_a_trainer_needs(untrained: Callable[[str], lab.Task]) -> None:
    task = dataclasses.replace(untrained("letters"), rows=lambda split, size, seed: [{"prompt": [], "answer": "a"}])
    with pytest.raises(ConfigError, match=r"task 'letters': row 0 lacks chosen and rejected; it has \['answer', 'pr"):
        lab.trainer_arguments(task, "dpo", say=lambda line: None)


def test_a_trainer_that_the_task_does_not_feed() -> None:
    with pytest.raises(ConfigError, match=r"task 'calculator' feeds grpo, not 'dpo'\."):
        lab.trainer_arguments(lab.task("calculator"), "dpo")


def test_the_behaviour_is_logged_exactly(untrained: Callable[[str], lab.Task]) -> None:
    task = untrained("modes")
    (reward,) = lab.trainer_arguments(task, "grpo", train_size=1, test_size=1, say=lambda line: None)["reward_funcs"]
    logged: list[tuple[str, float]] = []
    columns = {
        "completions": [[{"role": "assistant", "content": text}] for text in ("<short>7", "<think>+4=7</think>7")],
        "kind": ["easy", "hard"],
        "answer": ["7", "8"],
    }
    assert reward(**columns, log_metric=lambda name, value: logged.append((name, value))) == [1, 0]
    assert reward(**columns) == [1, 0] and reward.__name__ == "correct"
    assert sorted(logged) == [
        *(("behaviour/correct_easy_short", 1), ("behaviour/correct_hard_think", 0)),
        *(("behaviour/think_easy", 0), ("behaviour/think_hard", 1)),
    ]


@pytest.fixture(scope="module")
def caller() -> lab.Task:
    """The calculator after a short warm-up: it calls, and gets most expressions wrong."""
    return dataclasses.replace(
        calculator.CALCULATOR, warm_up=WarmUp(traces=512, steps=80, batch_size=32, learning_rate=8e-3)
    )


@pytest.mark.slow
def test_trl_carries_the_calls_out(caller: lab.Task, tmp_path: Path) -> None:
    """Calls of the model reach the function, what it returns reaches the model, and no result is trained on."""
    asked: list[str] = []
    seen: list[Any] = []

    def calculate(expression: str) -> str:
        asked.append(expression)
        return calculator.calculate(expression)

    calculate.__doc__ = calculator.calculate.__doc__
    correct = caller.rewards[0]

    def watched(completions: list[Any], **columns: Any) -> list[float]:
        seen.extend(completions)
        return correct(completions=completions, **columns)

    arguments = lab.trainer_arguments(caller, "grpo", train_size=16, say=lambda line: None)
    arguments |= {"tools": [calculate], "reward_funcs": [watched]}
    settings = {"max_completion_length": caller.max_completion_length, "max_steps": 1, "learning_rate": 1e-6}
    trainer = trainer_class("grpo")(
        args=tiny_args("grpo", tmp_path, per_device_train_batch_size=16, **settings), **arguments
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["tools/call_frequency"] > 0.5 and logged["tools/failure_frequency"] < 0.2
    results = [message for completion in seen for message in completion if message["role"] == "tool"]
    calls = [
        made["function"]["arguments"].get("expression")
        for completion in seen
        for message in completion
        for made in message.get("tool_calls") or []
    ]
    assert len(asked) >= len(results) >= 8 and set(asked) <= set(calls)
    for completion in seen:
        for message, answer in itertools.pairwise(completion):
            if answer["role"] == "tool" and message.get("tool_calls"):
                expression = message["tool_calls"][0]["function"]["arguments"].get("expression", "")
                assert answer["content"] == calculator.calculate(expression)
    assert sum(map(calls_made, seen)) == len(results)
