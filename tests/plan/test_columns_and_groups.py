"""Reward columns that plugins announce, and groups and prompts that they ask for, before a trainer is built."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.refusals import refused
from tests.sample_plugins import checking
from trl_ext import ConfigError, PluginError
from trl_ext.catalog.find import resolve
from trl_ext.plan.check import make_plan
from trl_ext.plan.compose import Plan
from trl_ext.testing import tiny_args
from trl_ext_hooks import Config, Need, Plugin, RewardName, Rewards, hookimpl, option


class Ensemble(Plugin):
    """Puts the mean of some columns in their place."""

    name = "ensemble"
    trainers = ("grpo", "rloo")

    @dataclass(frozen=True)
    class Options:
        members: tuple[RewardName, ...] = option(("digits", "brevity"), help="columns to combine")

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*(name for name in names if name not in self.options.members), "ensemble")

    @hookimpl
    def rewards(self, scored: Any) -> Rewards:
        raise NotImplementedError


class Look(Plugin):
    name = "look"
    trainers = ("grpo", "rloo")

    @hookimpl
    def configure(self, config: Config) -> None:
        self.seen = config.reward_names


NAMES = ("format", "digits", "brevity")


@pytest.fixture
def plan(plugin: Any, tmp_path: Path) -> Any:
    def make(*requests: Any, kind: str = "grpo", names: Any = NAMES, **settings: Any) -> Plan:
        references: dict[str, Any] = {}
        for request in requests:
            cls, values = request if isinstance(request, tuple) else (request, {})
            references[cls if isinstance(cls, str) else plugin(cls)] = values
        args = tiny_args(kind, tmp_path, **settings)
        return make_plan(resolve(references), Config(kind, args, names, ("prompt",), ()))

    return make


def test_columns_are_known_to_every_plugin(plan: Any) -> None:
    made = plan(Look, Ensemble, ("gdpo", {"conditions": [{"target": "format", "given": "ensemble"}]}))
    assert made.plugins["look"].seen == ("format", "ensemble")
    assert made.reward_columns == {"ensemble": ("format", "ensemble")}
    # the rewards in the order of the user, the advantages with the estimator first
    assert [spec.name for spec in made.specs] == ["look", "ensemble", "gdpo"]
    assert made.users("rewards") == ["ensemble", "gdpo"]
    # where the names are not known yet, nobody is asked
    assert plan(Look, Ensemble, names=None).plugins["look"].seen is None


def test_names_are_checked_where_a_plugin_sees_them(plan: Any) -> None:
    text = "gdpo: no reward function is called 'digits'. Known: ensemble, format. Correct gdpo.conditions."
    conditions = {"conditions": [{"target": "format", "given": "digits"}]}
    assert plan(("gdpo", conditions), Ensemble)  # it gets the columns before the ensemble
    with refused(ConfigError, text):
        plan(Ensemble, ("gdpo", conditions))
    with refused(
        ConfigError, "ensemble: no reward function is called 'right'. Known: brevity, digits, ensemble, format."
    ):
        plan((Ensemble, {"members": ["right"]}))


@pytest.mark.parametrize("result", [[], "digits", ("a", "a"), ("a", 1), ("a", "")])
def test_wrong_columns(result: Any, plan: Any) -> None:
    class Wrong(Ensemble):
        @hookimpl
        def reward_columns(self, names: tuple[str, ...]) -> Any:
            return result

    with refused(PluginError, f"plugin 'ensemble' returned {result!r} from 'reward_columns', expected a tuple"):
        plan(Wrong)


def test_columns_without_rewards_and_errors_inside(plan: Any) -> None:
    class Only(Plugin):
        name = "only"
        trainers = ("grpo",)

        @hookimpl
        def reward_columns(self, names: tuple[str, ...]) -> Any:
            return names[7]

    with refused(PluginError, "plugin 'only' implements `reward_columns`, and lacks the hook `rewards`"):
        plan(Only)
    rewriting = type("Rewriting", (Only,), {"rewards": Ensemble.rewards})
    with refused(PluginError, "plugin 'only' failed in its hook 'reward_columns': IndexError"):
        plan(rewriting)


FORMS: dict[str, Any] = {"claims": ("groups",), "trainers": ("grpo", "rloo")}


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_prompts_of_a_round(kind: str, plan: Any) -> None:
    for asked, expected in (("prompts:4", 4), ("prompts:8", 8)):
        assert plan(checking(needs=(asked,), **FORMS), kind=kind).prompts == expected
    assert plan(checking(Need("prompts:2"), **FORMS), kind=kind).prompts == 2 and plan(Look, kind=kind).prompts is None
    text = "checking: a round of generation_batch_size=8 rows cannot have 3 prompts, each equally often; use 2 or 4"
    with refused(ConfigError, text):
        plan(checking(needs=("prompts:3",), **FORMS), kind=kind)
    twice = "the number of prompts of a round is asked for twice: checking 2, checking 4; leave one of them out"
    with refused(ConfigError, twice):
        plan(checking(Need("prompts:4"), needs=("prompts:2",), **FORMS), kind=kind)
    with refused(PluginError, "plugin 'checking' needs 'prompts:2', which belongs to the claim 'groups'; declare it."):
        plan(checking(needs=("prompts:2",), trainers=("grpo", "rloo")), kind=kind)


@pytest.mark.parametrize("need", ["prompts:", "prompts:many", "prompts:-1"])
def test_a_number_of_prompts_is_a_number(need: str, plan: Any) -> None:
    with refused(PluginError, f"`needs` holds {need!r}"):
        plan(checking(needs=(need,), **FORMS))


def test_groups_of_any_size_and_whole_ones_exclude_each_other(plan: Any) -> None:
    former = checking(**FORMS)
    with refused(ConfigError, "'checking' forms groups of any size, and 'p3o' needs whole groups in every micro-batch"):
        plan(former, "p3o", per_device_train_batch_size=8)
    with refused(ConfigError, "checking: groups must stay whole, and checking forms groups of any size"):
        plan(checking(Need("whole_groups"), **FORMS))
    other = type("Other", (former,), {"name": "other"})
    with refused(ConfigError, "both claim groups"):
        plan(former, other)


PER_STEP = checking(needs=("grouped_steps",), trainers=("grpo", "rloo"))


@pytest.mark.parametrize(
    ("rows", "accumulated", "slices", "iterations", "fits"),
    [
        (2, 4, 4, 1, True),  # a step takes the whole round, so groups of 4 may lie on several processes
        (3, 1, 1, 2, True),
        (2, 2, 1, 2, True),  # twice
        (4, 1, 4, 1, True),
        (2, 2, 4, 1, True),  # two micro-batches hold a group
        (2, 1, 4, 1, False),
        (3, 2, 4, 1, False),
        (4, 2, 3, 2, True),  # the second step goes round the end of the round
        (2, 2, 3, 2, False),
    ],
)
def test_steps_that_split_groups(
    rows: int, accumulated: int, slices: int, iterations: int, fits: bool, plugin: Any, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": accumulated, "steps_per_generation": slices}
    args = tiny_args("grpo", tmp_path, num_iterations=iterations, per_device_train_batch_size=4, **settings)
    args.per_device_train_batch_size = rows  # TRL takes any where the rows of all processes are whole groups
    text = f"it takes {rows * math.gcd(accumulated, slices)} rows in a row of each process"
    with contextlib.nullcontext() if fits else refused(ConfigError, text, "splits groups of num_generations=4; make"):
        make_plan(resolve({plugin(PER_STEP): {}}), Config("grpo", args, NAMES, ("prompt",), ()))


def test_the_ways_out_of_a_step_that_splits_groups(plan: Any) -> None:
    split = {"per_device_train_batch_size": 2, "steps_per_generation": 4}
    with refused(ConfigError, "make that number a multiple of 4, or set steps_per_generation=1 and num_iterations=4"):
        plan(PER_STEP, **split)
    plan(PER_STEP, **split | {"per_device_train_batch_size": 4})
    plan(PER_STEP, per_device_train_batch_size=4, steps_per_generation=1, num_iterations=4)


def test_groups_of_any_size_fit_into_steps_that_take_the_whole_round(plan: Any) -> None:
    former = type("Former", (checking(**FORMS),), {"name": "former"})
    plan(former, PER_STEP, steps_per_generation=1, num_iterations=2)
    text = "checking: every optimizer step must hold whole groups, and former forms groups of any size; set"
    with refused(ConfigError, text, "steps_per_generation=1, so that every step takes the whole round"):
        plan(former, PER_STEP, steps_per_generation=2)


def test_a_plugin_sees_which_values_the_plugins_of_the_run_may_add(plan: Any) -> None:
    seen = []

    class Asks(Plugin):
        name = "asks"
        trainers = ("grpo", "rloo")
        fields = ("own",)

        @hookimpl
        def configure(self, config: Any) -> None:
            seen.append(config.fields)

    plan(Asks, checking(fields=("agent", "turn"), trainers=("grpo", "rloo")))
    assert seen == [("own", "agent", "turn")]
