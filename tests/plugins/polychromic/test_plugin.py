"""Polychromic before training: what is refused, and what a function of strategies may return."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trl_ext
from tests.engine.stages.ranks import Ranks, RankView
from tests.refusals import refused, unloadable
from trl_ext_hooks import UsageError
from trl_ext_plugins.polychromic import Polychromic, strategies


@pytest.fixture
def strategy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """`strategy(function)` gives the dotted path of a function that a test makes."""

    def publish(function: Any) -> str:
        module = types.ModuleType("strategies_of_a_test")
        module.name_them = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return "strategies_of_a_test.name_them"

    return publish


def test_wrong_settings_are_refused(build: Any, strategy: Any) -> None:
    with refused(trl_ext.OptionError, "polychromic", "strategy"):
        trl_ext.enable("polychromic")
    with refused(trl_ext.OptionError, "importing 'no_such_module' failed"):
        trl_ext.enable("polychromic", polychromic={"strategy": "no_such_module.f"})
    path = strategy(lambda completions, **columns: [0] * len(completions))
    with refused(trl_ext.OptionError, "polychromic.set_size: expected int, >= 1, got 0"):
        trl_ext.enable("polychromic", polychromic={"strategy": path, "set_size": 0})
    with (
        trl_ext.enable("polychromic", polychromic={"strategy": path}),
        refused(
            trl_ext.ConfigError,
            "polychromic: num_generations=4 completions of a prompt have no two sets of 4, so all advantages would",
            "Set num_generations above 4, or polychromic.set_size below 4.",
        ),
    ):
        build(cls=unloadable("grpo"))
    with trl_ext.enable("polychromic", polychromic={"strategy": path, "set_size": 3}):
        build()  # the way out
    with trl_ext.enable("polychromic", polychromic={"strategy": path, "set_size": 1}):
        assert "sets of one completion cannot be diverse" in build()._trl_ext.plan.notes[0]


def made_round(view: Any, rewards: list[float], size: int = 4) -> tuple[Any, dict[str, Any]]:
    """The part of a round that the plugin reads, for one process, and what it logs."""
    logged: dict[str, Any] = {}
    everything = torch.tensor(rewards)
    count = len(rewards) // view.num_processes
    start = view.process_index * count
    texts = [f"{'abc'[row % 3]}{row}" for row in range(start, start + count)]
    return types.SimpleNamespace(
        trainer=view,
        rewards=everything.unsqueeze(1),
        total_reward=everything.double(),
        group_ids=torch.arange(len(rewards)) // size,
        local=slice(start, start + count),
        rows=[{}] * count,
        prompts=[""] * count,
        completions=texts,
        completion_ids=[[1]] * count,
        columns={"place": list(range(start, start + count))},
        log=lambda name, values, count=None: logged.update({name: (values, count)}),
    ), logged


REWARDS = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_process_gets_the_advantages_of_one(count: int, strategy: Any) -> None:
    """Groups of four on two processes of six rows, and on three of four."""
    path = strategy(lambda completions, place, **columns: [frozenset(text[:1]) for text in completions])
    ranks = Ranks(count)

    def work(rank: int) -> tuple[list[float], Any]:
        round, logged = made_round(RankView(ranks, rank), REWARDS)
        ours = Polychromic(Polychromic.Options(strategy=path, set_size=2)).advantages(round)
        return ours.tolist(), logged["strategies"]

    results = ranks.run(work)
    assert results == [results[0]] * count and len(set(results[0][0])) > 3
    assert results[0][1] == (9, 3), "three letters in each of three groups"
    alone, _ = made_round(RankView(Ranks(1), 0), REWARDS)
    assert Polychromic(Polychromic.Options(strategy=path, set_size=2)).advantages(alone).tolist() == results[0][0]


def test_an_error_on_one_process_stops_all(strategy: Any) -> None:
    def fails(completions: list[str], place: list[int], **columns: Any) -> list[str]:
        if 6 in place:
            raise OSError("no connection")
        return completions

    path, ranks = strategy(fails), Ranks(2)

    def work(rank: int) -> Any:
        round, _ = made_round(RankView(ranks, rank), REWARDS)
        return Polychromic(Polychromic.Options(strategy=path, set_size=2)).advantages(round)

    first, second = ranks.run(work)
    assert isinstance(second, OSError) and isinstance(first, UsageError)
    assert str(first) == "stopped with another process: OSError: no connection"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (["a"], "returned 1 values, expected a list of 12: one per completion"),
        ("abcdefghijkl", "returned str, expected a list of 12"),
        ([["a"]] * 12, "returned list for row 0, expected a text, a number or another hashable value"),
    ],
)
def test_results_of_the_wrong_form(result: Any, text: str, strategy: Any) -> None:
    path = strategy(lambda **columns: result)
    round, _ = made_round(RankView(Ranks(1), 0), REWARDS)
    with pytest.raises(UsageError, match=text):
        Polychromic(Polychromic.Options(strategy=path, set_size=2)).advantages(round)


def test_strategies_that_are_there_already() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "search"}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}, {"function": {"name": "search"}}]}
    said = [{"role": "assistant", "content": " 7 "}]
    completions: list[Any] = [[call, other, *said], said, "7", "", [call]]
    assert strategies.last_text(completions=completions, index=[0]) == ["7", "7", "7", None, None]
    answers = [["7", "8"], ["8"], ["7"], [""], ["7"]]
    assert strategies.known_answer(completions=completions, answers=answers) == ["7", None, "7", None, None]
    called = strategies.tools_called(completions=completions)
    assert called == [{"search", "add"}, frozenset(), frozenset(), frozenset(), {"search"}]
