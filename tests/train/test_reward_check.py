"""Reward functions, called as in training before the model is loaded, in a process of their own."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_ext import ConfigError
from trl_ext.train import reward_check

ROWS = [{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2", "index": 0}] * 2
PLAIN = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def tried(function: Any, rows: Any = ROWS, **arguments: Any) -> list[str]:
    warnings: list[str] = []
    reward_check.check_rewards({"it": function}, rows, warnings.append, **arguments)
    return warnings


def test_reward_functions_are_called_as_the_trainer_does() -> None:
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **columns):  # type: ignore[no-untyped-def]
        log_metric("name", 1.0)
        log_extra("name", [1, 2])
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer, columns=columns)
        return [None, 1]

    assert tried(reward) == [] and seen["columns"] == {"index": [0, 0]}
    assert seen["completions"] == [[{"role": "assistant", "content": ""}]] * 2
    assert [len(ids) for ids in seen["ids"]] == [1, 1]  # the token that ends a completion
    assert tried(reward, PLAIN) == [] and seen["completions"] == ["", ""] and seen["answer"] == ["2", "4"]


def test_asynchronous_reward_functions() -> None:
    async def slow(completions: Any, **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    class Slow:
        async def __call__(self, completions: Any, **columns: Any) -> list[float]:
            return [0.0]

    assert tried(slow) == []
    with pytest.raises(ConfigError, match="returned 1 rewards for 2 completions"):
        tried(Slow())


def test_asynchronous_reward_functions_share_one_loop() -> None:
    limit = asyncio.Semaphore(1)

    async def judge(completions: Any, **columns: Any) -> list[float]:
        async def one() -> float:
            async with limit:
                await asyncio.sleep(0)
                return 1.0

        return list(await asyncio.gather(*(one() for _ in completions)))

    notes: list[str] = []
    reward_check.check_rewards({"one": judge, "other": judge}, ROWS, notes.append)
    assert notes == []


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (1.0, "returned float for 2 completions, expected a list of 2 numbers"),
        ([0.0] * 3, "returned 3 rewards for 2 completions"),
        (["good", "bad"], "returned 'good', expected a number"),
        (["1.0", "2.0"], "returned '1.0', expected a number"),
    ],
)
def test_results_of_a_wrong_kind(result: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}.*--no_reward_check leaves this trial out"):
        tried(lambda **columns: result)


def test_an_exception_is_a_warning() -> None:
    def picky(completions: Any, **columns: Any) -> list[float]:
        return [float(completion[0]["content"]) for completion in completions]

    (warning,) = tried(picky)
    assert all(word in warning for word in ("ValueError", "empty completions", "--no_reward_check"))


def test_schedules_see_the_state_of_a_run() -> None:
    def shaped(completions: Any, trainer_state: Any, **columns: Any) -> list[float]:
        return [
            trainer_state.epoch / trainer_state.num_train_epochs + trainer_state.global_step / trainer_state.max_steps
        ]

    assert tried(shaped, ROWS[:1], state={"max_steps": 50}) == [] == tried(shaped, ROWS[:1])


def test_names_of_reward_models_are_left_to_the_trainer() -> None:
    assert tried("some/reward-model") == []


def test_functions_of_what_only_training_has_are_not_called() -> None:
    def by_environment(environments: Any, **columns: Any) -> list[float]:
        raise AssertionError("there is no environment yet")

    def by_rollout(completions: Any, logprobs_of_a_rollout: Any, **columns: Any) -> list[float]:
        raise AssertionError("there is no rollout yet")

    def by_plugin(completions: Any, found: Any = None, **columns: Any) -> list[float]:
        raise AssertionError("there is no rollout yet")

    assert tried(by_environment) == tried(by_rollout) == tried(by_plugin, unknown={"found"}) == []


# --- the process ---

MODULE = """
import os, sys, threading, time
from pathlib import Path
CALLS = 0
joins = [name for name in ("RANK", "MASTER_ADDR") if name in os.environ]
Path(os.environ["TRACE"]).write_text(" ".join([str(os.getpid()), *joins]))
{}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """`module(code)` writes a module of rewards that the process can import, and returns the path of its `reward`."""
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code: str) -> str:
        sys.modules.pop("rewards_of_a_test", None)
        (tmp_path / "rewards_of_a_test.py").write_text(MODULE.format(code))
        return "rewards_of_a_test.reward"

    yield write
    sys.modules.pop("rewards_of_a_test", None)


def notes_of(path: str) -> list[str]:
    notes: list[str] = []
    reward_check.try_in_own_process([path], ROWS, {"max_steps": 3}, notes.append)
    return notes


def test_a_process_that_ends_at_once_is_a_note(module: Any, tmp_path: Path) -> None:
    (note,) = notes_of(module("os._exit(3)"))
    assert "could not be tried: their process ended with exit code 3. --no_reward_check" in note
    (process,) = (tmp_path / "trace").read_text().split()  # and no variable with which it would join the training
    assert int(process) != os.getpid() and "rewards_of_a_test" not in sys.modules


def test_a_process_that_hangs_is_ended(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "LIMIT", 1.0)
    (note,) = notes_of(module("time.sleep(600)"))
    assert "their process did not end within 1 s" in note


def test_rows_that_cannot_go_to_another_process_are_a_note() -> None:
    notes: list[str] = []
    reward_check.try_in_own_process(["a.b"], [{"prompt": "", "video": lambda: None}], {}, notes.append)
    assert "were not tried: rows of the data cannot go to another process" in notes[0]


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the seconds that a new interpreter takes to load torch; `test_runs.py` starts a real one."""

    def run(folder: Path) -> str:
        reward_check.main([str(folder)])
        return "ended with exit code 0"

    monkeypatch.setattr(reward_check, "_run", run)


def test_what_the_process_answers(module: Any, same_process: None) -> None:
    path = module("def reward(completions, trainer_state, **columns):\n    return [1 / (trainer_state.max_steps - 3)]")
    (note,) = notes_of(path)
    assert "reward function 'rewards_of_a_test.reward' raised ZeroDivisionError" in note
    with pytest.raises(ConfigError, match="returned 1 rewards for 2 completions"):
        notes_of(module("def reward(**columns):\n    return [1.0]  # another"))
    (note,) = notes_of(module("raise OSError('the port is taken')"))
    assert "could not be tried in a process of their own" in note and "the port is taken" in note


@pytest.mark.slow
def test_a_real_process_leaves_no_trace_and_need_not_end_by_itself(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_check, "GRACE", 0.5)
    path = module("threading.Thread(target=time.sleep, args=(600,)).start()\ndef reward(**columns):\n    return [1.0]")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="returned 1 rewards for 2 completions"):
        notes_of(path)
    assert time.monotonic() - began < 200 and "rewards_of_a_test" not in sys.modules
