"""What environments give turn by turn, in TRL's own tool loop: the need `turns`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import ConfigError, PluginError
from trl_ext.engine.context import Poll
from trl_ext.engine.stages import turns as stage
from trl_ext.testing import digits
from trl_ext_hooks import Plugin, hookimpl

_conftest = Path(__file__).parents[2] / "conftest.py"
_spec = importlib.util.spec_from_file_location("shared_fixtures", _conftest)
assert _spec and _spec.loader
shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shared)
call = shared.tool_call


class Watch(Plugin):
    name = "watch"
    trainers = ("grpo", "rloo")
    needs = ("turns",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []

    @hookimpl
    def annotate(self, rollout: Any) -> None:
        self.rounds.append(rollout)


@pytest.fixture
def watch(build: Any, plugin: Any, tool_model: str) -> Callable[..., Any]:
    """Trains with an environment, and gives the first rollout that the plugin saw."""

    def run(environment: Any, rows: int, **settings: Any) -> Any:
        common = {"model": tool_model, "max_completion_length": 400, "max_steps": 1, "rewards": [digits]}
        common |= {"per_device_train_batch_size": rows, "num_generations": 2}
        with trl_ext.enable(plugin(Watch)):
            trainer = build("grpo", trainer={"environment_factory": environment}, **common | settings)
            trainer.train()
            return trainer._trl_ext.plugins["watch"].rounds[0]

    return run


def test_rewards_belong_to_the_turn_that_earned_them(watch: Any, play: Any) -> None:
    script = [
        ["no call"],
        [call("go", pay=1), "done"],
        [call("go", pay=0.5), call("go", pay=2), "done"],
        [call("go", pay=1) + call("go", pay=2), call("end", pay=4), "bye"],  # two calls in one turn
        [call("crash"), call("go", pay=3), "done"],
        [call("nothing"), "done"],  # an unknown tool
        [call("go", pay=1), call("stop"), call("go", pay=9), "bye"],  # goes on after a limit
        [call("go", pay=77), call("go", pay=1), "done"],  # not a number from here on
    ]
    found = watch(play(script), len(script))
    turns, nan = found.turns, float("nan")
    assert turns.rewards.dtype == torch.float64 and turns.rewarded.all()
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [0.5, 2, 0, 0], [3, 4, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [1, 0, 9, 0]]
    torch.testing.assert_close(turns.rewards, torch.tensor([*expected, [nan] * 4]).double(), equal_nan=True)
    assert turns.done.tolist() == [[False] * 5] * 3 + [[False, False, True, True, True]] + [[False] * 5] * 4
    assert turns.truncated.tolist()[6] == [False, False, True, True, True]
    runs = [sum(a > b for a, b in zip(mask, [0, *mask], strict=False)) for mask in found.tool_mask]
    assert runs == [1, 2, 3, 3, 3, 2, 4, 3]
    errors = [message["content"] for message in found.completions[4] if message["role"] == "tool"]
    assert errors[0] == "{'error': 'the simulator is gone'}" and errors[1] == "ok"


def test_a_result_that_does_not_fit_still_counts(watch: Any, play: Any) -> None:
    """The environment has made the step, although its answer and the next turn are not there."""
    long = call("go", pay=1)
    found = watch(play([[long, call("go", pay=5), "x"], ["."]]), 2, max_completion_length=2 * len(long) - 10)
    assert found.turns.rewards[0].tolist() == [1, 5]
    assert found.completions[0][-1]["tool_calls"] and sum(m["role"] == "tool" for m in found.completions[0]) == 1


def test_the_limit_of_calls(watch: Any, play: Any) -> None:
    found = watch(play([[call("go", pay=1)] * 4, ["."]]), 2, max_tool_calling_iterations=2)
    assert found.turns.rewards[0].tolist() == [1, 1, 0]  # the third call is not run
    assert found.completions[0][-1]["tool_calls"]


def test_two_passes_over_a_generation(build: Any, plugin: Any, tool_model: str, play: Any) -> None:
    """An episode that was played would go on in the second pass, so that is refused."""

    class Twice(Plugin):
        name = "twice"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: Any, generate: Any) -> Any:
            generate(prompts)
            return generate(prompts)

    environment = play([[call("go", pay=1), "x"], ["."]])
    common = {"model": tool_model, "max_completion_length": 200, "max_steps": 1}
    with trl_ext.enable(plugin(Twice), plugin(Watch)):
        trainer = build(trainer={"environment_factory": environment}, **common)
        with pytest.raises(PluginError, match=r"'twice': .* as pass 2 of the round. With an environment it runs once"):
            trainer.train()


def test_a_total_may_be_told_instead(play: Any) -> None:
    class Total:
        total_reward = 1.5
        done = 1

    class Empty:
        pass

    assert stage.poll(Total()) == Poll(1.5, True, False)
    assert stage.poll(Empty()) == Poll(None, False, False)
    found = stage.between([[Poll(None, False, False)] * 2] * 3, torch.device("cpu"))
    assert found is not None and not found.rewarded.any() and found.rewards.tolist() == [[0, 0], [0, 0]]
    assert stage.between([], torch.device("cpu")) is None


@pytest.mark.parametrize("values", [{"total_reward": "much"}, {"step_rewards": [1, None]}, {"step_rewards": 3}])
def test_a_reward_that_is_no_number(values: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=rf"the environment Odd has {next(iter(values))} = .*, expected"):
        stage.poll(type("Odd", (), values)())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_reward_that_is_not_finite(value: float) -> None:
    polls = [[Poll(total, False, False)] for total in (0.0, 1.0, value, value)]
    rewards = stage.between(polls, torch.device("cpu")).rewards[0]  # type: ignore[union-attr]
    assert rewards[0] == 1 and rewards[1:].isnan().all()


def test_without_environments_there_are_no_turns(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Watch)):
        trainer = build(max_steps=1)
        trainer.train()
        assert trainer._trl_ext.plugins["watch"].rounds[0].turns is None


def test_rloo_has_no_environments(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Watch)), pytest.raises(ConfigError, match="RLOO does not support; use GRPO"):
        build("rloo")
