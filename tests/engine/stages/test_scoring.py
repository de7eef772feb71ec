"""Rewards that plugins rewrite, and what every hook sees of a scored round."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused, unloadable
from trl_ext import ConfigError, PluginError
from trl_ext.testing import brevity, digits, metrics_of
from trl_ext_hooks import Plugin, RewardName, Rewards, hookimpl, option
from trl_ext_hooks.toolkit.groups import group_normalize

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Triple(Plugin):
    name = "triple"
    trainers = ROUNDS

    @hookimpl
    def rewards(self, scored: Any) -> torch.Tensor:
        self.before = scored.rewards.clone()
        return 3 * scored.rewards


class Swap(Plugin):
    """Drops `brevity`, adds `bonus` with a weight of its own."""

    name = "swap"
    trainers = ROUNDS

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return ("digits", "bonus")

    @hookimpl
    def rewards(self, scored: Any) -> Rewards:
        assert scored.reward_names == ("digits", "brevity")
        self.before = scored.rewards.clone()
        bonus = torch.arange(len(scored.rewards)).float() % 3
        return Rewards(torch.stack([scored.rewards[:, 0], bonus], dim=1), ("digits", "bonus"), torch.tensor([1.0, 0.5]))

    @hookimpl
    def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
        assert round.reward_names == ("digits", "bonus")
        self.round = round
        return {"bonus": (round.rewards[:, 1].sum().item(), len(round.rewards))}


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("order", ["triple-first", "swap-first"])
def test_rewards_are_chained_logged_and_used(kind: str, order: str, build: Any, plugin: Any) -> None:
    references = [plugin(Triple), plugin(Swap)]
    with trl_ext.enable(*(references if order == "triple-first" else references[::-1])):
        trainer = build(kind, beta=0.0, log_completions=True)
        functions = list(trainer.reward_funcs)
        trainer.train()
        triple, swap = own(trainer, "triple"), own(trainer, "swap")
    if order == "triple-first":
        assert torch.equal(swap.before, 3 * triple.before)
        final = swap.round.rewards
    else:
        final = 3 * triple.before
        assert torch.equal(swap.round.rewards, final)
    assert logged(trainer, "rewards/digits/mean")[-1] == pytest.approx(final[:, 0].mean().item())
    assert logged(trainer, "rewards/bonus/mean")[-1] == pytest.approx(final[:, 1].mean().item())
    assert logged(trainer, "swap/bonus")[-1] == pytest.approx(final[:, 1].mean().item())
    assert not logged(trainer, "rewards/brevity/mean")
    total = final[:, 0] + 0.5 * final[:, 1]
    assert logged(trainer, "reward")[-1] == pytest.approx(total.mean().item())
    if kind == "grpo":
        expected = group_normalize(total, swap.round.group_ids)
        torch.testing.assert_close(swap.round.advantages, expected, atol=1e-5, rtol=0)
    # after the round the trainer has its own functions again
    assert trainer.reward_funcs == functions and trainer.reward_func_names == ["digits", "brevity"]
    assert trainer.reward_weights.tolist() == [1.0, 1.0]


@dataclass(frozen=True)
class Members:
    """Options of the ensemble below."""

    members: tuple[RewardName, ...] = option(("digits", "brevity"), help="columns to combine")


class Lowest(Plugin):
    """The lowest of some rewards takes their place."""

    name = "lowest"
    trainers = ROUNDS
    Options = Members

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*(name for name in names if name not in self.options.members), "lowest")

    @hookimpl
    def rewards(self, scored: Any) -> Rewards:
        self.before = scored
        values = torch.stack([scored.reward(name) for name in self.options.members]).amin(0)
        rest = [place for place, name in enumerate(scored.reward_names) if name not in self.options.members]
        columns = torch.cat([scored.rewards[:, rest], values.unsqueeze(1)], dim=1)
        names = (*(scored.reward_names[place] for place in rest), "lowest")
        return Rewards(columns, names, torch.ones(len(names)))

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.round = round


def test_an_ensemble_before_an_estimator(build: Any, plugin: Any) -> None:
    """GDPO sees and names the column of the ensemble, because the user names the ensemble first."""

    def flag(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(place % 2) for place in range(len(completions))]

    conditions = [{"target": "flag", "given": "lowest", "threshold": 0.2}]
    with trl_ext.enable(plugin(Lowest), {"gdpo": {"conditions": conditions}}):
        trainer = build(max_steps=1, rewards=[flag, digits, brevity])
        mine = own(trainer, "lowest")
        trainer.train()
    before, round = mine.before, mine.round
    lowest = before.rewards[:, 1:].amin(1)
    expected = torch.where(lowest >= 0.2, before.rewards[:, 0], 0.0)
    assert round.reward_names == ("flag", "lowest") and torch.equal(round.rewards[:, 1], lowest)
    assert torch.equal(round.rewards[:, 0], expected) and not torch.equal(expected, before.rewards[:, 0])
    assert logged(trainer, "rewards/lowest/mean") == [pytest.approx(lowest.mean().item())]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (None, "returned None from 'rewards', expected the columns lowest that its 'reward_columns' announced"),
        (torch.zeros(8, 2), "returned the reward columns digits, brevity from 'rewards', expected lowest."),
    ],
)
def test_announced_columns_must_come(returned: Any, text: str, build: Any, plugin: Any) -> None:
    class Broken(Lowest):
        @hookimpl
        def rewards(self, scored: Any) -> Any:
            return returned

    with trl_ext.enable(plugin(Broken)), refused(PluginError, f"plugin 'lowest' {text}"):
        build(max_steps=1).train()


def test_nan_from_a_plugin_means_does_not_apply(build: Any, plugin: Any) -> None:
    class Unscored(Plugin):
        name = "unscored"
        trainers = ("grpo",)

        @hookimpl
        def rewards(self, scored: Any) -> torch.Tensor:
            out = scored.rewards.clone()
            out[2] = torch.nan
            return out

        @hookimpl
        def round_metrics(self, round: Any) -> None:
            self.advantages = round.advantages

    with trl_ext.enable(plugin(Unscored)):
        trainer = build(max_steps=1)
        trainer.train()
        advantages = own(trainer, "unscored").advantages
    assert advantages[2] == 0 and torch.isfinite(advantages).all() and (advantages != 0).sum() > 4


def test_rewards_and_advantages_see_every_reward_function(build: Any, plugin: Any) -> None:
    class Look(Plugin):
        name = "look"
        trainers = ROUNDS

        @hookimpl
        def rewards(self, scored: Any) -> None:
            self.scored = scored

    with trl_ext.enable(plugin(Look)):
        trainer = build(max_steps=1, reward_weights=[0.25, 4.0])
        trainer.train()
        scored = own(trainer, "look").scored
    assert scored.reward_names == ("digits", "brevity") and scored.reward_weights.tolist() == [0.25, 4.0]
    ids, texts = scored.completion_ids, scored.completions
    expected = torch.tensor([digits(texts), brevity(ids)]).T
    torch.testing.assert_close(scored.rewards, expected)
    assert (scored.num_generations, scored.mode, scored.step, scored.offset) == (4, "train", 0, 0)
    assert scored.group_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert metrics_of(trainer)[0]["reward"] == pytest.approx((scored.rewards @ scored.reward_weights).mean().item())


def spoilt(value: float) -> Any:
    """Makes a reward function that returns `value` for one completion."""

    def share(completions: list[Any], **kwargs: Any) -> list[float]:
        return [value if i == 5 else float(i % 3) for i in range(len(completions))]

    return share


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("kind", ROUNDS)
def test_an_infinite_reward_names_its_function(value: float, kind: str, build: Any, plugin: Any) -> None:
    with (
        trl_ext.enable(plugin(Triple)),
        pytest.raises(ConfigError, match=r"reward function 'share' returned -?inf for 1"),
    ):
        build(kind, max_steps=1, rewards=[digits, spoilt(value)]).train()


def test_an_infinite_reward_of_a_plugin_names_the_plugin(build: Any, plugin: Any) -> None:
    class Log(Plugin):
        name = "log"
        trainers = ROUNDS

        @hookimpl
        def rewards(self, scored: Any) -> torch.Tensor:
            return torch.log(scored.rewards * 0)

    with trl_ext.enable(plugin(Log)), pytest.raises(PluginError, match="plugin 'log', reward 'digits', returned -inf"):
        build(max_steps=1).train()


def test_infinite_weights_are_refused_before_the_model_is_loaded(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Triple)), refused(ConfigError, "reward_weights=[inf, 1.0] must be finite numbers"):
        build(cls=unloadable("grpo"), reward_weights=[math.inf, 1.0])


def test_two_reward_functions_of_one_name_have_two_names(build: Any, plugin: Any) -> None:
    """TRL calls a partial by its function, and averages the metrics of functions with one name."""

    def flat(level: float, completions: list[Any], **kwargs: Any) -> list[float]:
        return [level] * len(completions)

    class Look(Plugin):
        name = "look"
        trainers = ROUNDS
        needs = ("reward:flat_2",)

        @hookimpl
        def rewards(self, scored: Any) -> None:
            self.names, self.second = scored.reward_names, scored.reward("flat_2")

    functions = [functools.partial(flat, 1.0), functools.partial(flat, 3.0)]
    with trl_ext.enable(plugin(Look)):
        trainer = build(max_steps=1, rewards=functions, log_completions=True)
        trainer.train()
        look = own(trainer, "look")
    assert look.names == ("flat", "flat_2") and look.second.tolist() == [3.0] * 8
    assert (logged(trainer, "rewards/flat/mean"), logged(trainer, "rewards/flat_2/mean")) == ([1.0], [3.0])
    assert trainer.reward_func_names == ["flat", "flat"]
