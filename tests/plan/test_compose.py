"""Combinations of plugins that cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import Good
from trl_ext import ConfigError, PluginError
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl


def claiming(title: str, base: type[Plugin] = Good, **attributes: Any) -> type[Plugin]:
    return type(title, (base,), {"name": title, **attributes})


class OwnsLoss(Good):
    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(loss.per_token_logps)


class OwnsForward(Good):
    @hookimpl
    def logps(self, call: Any, compute: Any) -> Any:
        return compute()


class Scorer(Good):
    @hookimpl
    def rewards(self, scored: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("base", "attributes", "what"),
    [
        (Good, {"claims": ("estimator",)}, "estimator"),
        (Good, {"fields": ("same",)}, "field 'same'"),
        (OwnsLoss, {}, "policy_loss"),
        (OwnsForward, {}, "logps"),
    ],
)
def test_two_owners_of_one_thing(
    base: type[Plugin], attributes: dict[str, Any], what: str, plugin: Callable[[type], str]
) -> None:
    references = [plugin(claiming(name, base, **attributes)) for name in ("one", "two")]
    expected = f"plugins 'one' and 'two' cannot be combined: both claim {what}. Leave one out"
    for enable in (trl_ext.enable, lambda *names: trl_ext.extend(_grpo(), *names)):
        with refused(ConfigError, expected):
            enable(*references)


def _grpo() -> Any:
    from trl import GRPOTrainer

    return GRPOTrainer


def test_two_estimators_built_in_and_own(plugin: Callable[[type], str]) -> None:
    ways = "Leave one out, or weigh them: --plugin mix --set mix.weights='{gdpo: 0.5, mine: 0.5}'"
    with refused(ConfigError, f"plugins 'gdpo' and 'mine' cannot be combined: both claim estimator. {ways}"):
        trl_ext.enable("gdpo", plugin(claiming("mine", claims=("estimator",))))


def test_advantages_that_a_loss_would_not_use(plugin: Callable[[type], str]) -> None:
    class Adjusts(Good):
        @hookimpl
        def advantages(self, round: Any) -> None:
            return None

    loss = plugin(claiming("loss", OwnsLoss, claims=("no_advantages",)))
    expected = "cannot be combined: {!r} makes advantages, and the loss of 'loss' uses none. Leave one out."
    for other, name in (("gdpo", "gdpo"), (plugin(claiming("adjusts", Adjusts)), "adjusts")):
        with refused(ConfigError, f"plugins 'loss' and {name!r} " + expected.format(name)):
            trl_ext.enable(other, loss)
    with trl_ext.enable(loss, plugin(claiming("scorer", Scorer))):
        pass


def test_rewards_that_are_labels_must_not_be_rewritten(plugin: Callable[[type], str]) -> None:
    reader, scorer = plugin(claiming("reader", claims=("reward_labels",))), plugin(claiming("scorer", Scorer))
    text = "'scorer' rewrites rewards, and 'reader' reads them as labels, not as amounts. Leave one out."
    with refused(ConfigError, f"plugins 'reader' and 'scorer' cannot be combined: {text}"):
        trl_ext.enable(scorer, reader)
    for name in ("decs", "trpa"):
        with refused(ConfigError, f"plugins {name!r} and 'otc' cannot be combined: 'otc' rewrites rewards"):
            trl_ext.enable("otc", name)
    with trl_ext.enable(plugin(claiming("both", Scorer, claims=("reward_labels",)))):
        pass  # its own rewards are its own business


def test_weights_of_tokens_beside_a_replaced_loss(plugin: Callable[[type], str]) -> None:
    class Weighs(Good):
        @hookimpl
        def token_weights(self, round: Any) -> None:
            return None

    weighs, loss = plugin(claiming("weighs", Weighs, trainers=("grpo",))), plugin(claiming("loss", OwnsLoss))
    with refused(ConfigError, "'weighs' weighs tokens for the averages of TRL's loss, and 'loss' replaces that loss"):
        trl_ext.enable(weighs, loss)
    unused = plugin(claiming("unused", OwnsLoss, claims=("no_advantages",)))
    with refused(ConfigError, "'weighs' makes advantages, and the loss of 'unused' uses none"):
        trl_ext.enable(weighs, unused)


def test_advantages_of_tokens_beside_a_loss_of_rows(plugin: Callable[[type], str]) -> None:
    rows = plugin(claiming("rows", claims=("row_advantages",)))
    with refused(ConfigError, "'decs' makes an advantage per token, and the loss of 'rows' uses one per row"):
        trl_ext.enable("decs", rows)
    with trl_ext.enable("gdpo", rows):
        pass


def test_no_trainer_is_served_by_all(plugin: Callable[[type], str]) -> None:
    pairs = plugin(claiming("pairs", trainers=("dpo",)))
    with refused(ConfigError, "no trainer is served by all plugins (gdpo: grpo; pairs: dpo). Leave one out."):
        trl_ext.enable("gdpo", pairs)


def test_a_trainer_that_calls_none_of_the_hooks(plugin: Callable[[type], str]) -> None:
    from trl import DPOTrainer

    scorer = plugin(claiming("scorer", Scorer, trainers=("grpo", "dpo")))
    with refused(PluginError, "plugin 'scorer' declares the DPO trainer, which calls none of its hooks (rewards)"):
        trl_ext.extend(DPOTrainer, scorer)
