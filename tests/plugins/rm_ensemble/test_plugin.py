"""The ensemble as a plugin: columns, weights, running scales, and what is refused before training."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused, unloadable
from trl_ext.errors import OptionError
from trl_ext_hooks import Round, UsageError
from trl_ext_plugins.rm_ensemble import RewardModelEnsemble

NAN = math.nan
ROWS = [[1.0, 10.0, 0.5, 3.0], [2.0, 30.0, 0.5, 1.0], [4.0, 20.0, 0.0, NAN], [NAN, NAN, 1.0, NAN]]


def made(rewards: list[list[float]] = ROWS, **more: Any) -> Round:
    count, names = len(rewards), ("a", "b", "form", "c")
    values: dict[str, Any] = dict.fromkeys(("rows", "prompts", "completions", "completion_ids"), [""] * count)
    values |= {"mode": "train", "step": 0, "num_generations": 4, "tool_mask": None, "offset": 0, "fields": {}}
    values |= {"trainer": types.SimpleNamespace(), "gathered": {}, "advantages": torch.zeros(count), "batch": {}}
    values |= {"rewards": torch.tensor(rewards), "reward_names": names[: len(rewards[0])]}
    values |= {"reward_weights": torch.tensor([2.0, 2.0, 0.25, 2.0]), "group_ids": torch.zeros(count, dtype=torch.long)}
    return Round(**values | more)


def ensemble(**options: Any) -> RewardModelEnsemble:
    return RewardModelEnsemble(RewardModelEnsemble.Options(**options))


def test_the_models_become_one_column() -> None:
    plugin, round = ensemble(models=("c", "a"), column="lowest"), made()
    result = plugin.rewards(round)
    assert result.names == plugin.reward_columns(round.reward_names) == ("lowest", "b", "form")
    assert result.values[:, 0].tolist() == pytest.approx([1.0, 1.0, 4.0, NAN], nan_ok=True)
    assert torch.equal(result.values[:, 1:].nan_to_num(nan=-1.0), round.rewards[:, 1:3].nan_to_num(nan=-1.0))
    assert result.weights.tolist() == [2.0, 2.0, 0.25]
    logged = round.metric_log.values
    assert logged["/model/a"] == (7.0, 3.0) and logged["/model/c"] == (4.0, 2.0)
    assert logged["/std"] == pytest.approx((1.5, 3.0)) and logged["/penalty"] == pytest.approx((1.5, 3.0))


def test_without_names_all_rewards_are_models() -> None:
    equal = made(reward_weights=torch.full((4,), 0.5))
    result = ensemble(objective="mean").rewards(equal)
    assert result.names == ("ensemble",) and result.weights.tolist() == [0.5]
    torch.testing.assert_close(result.values[:, 0], equal.rewards.nanmean(dim=1), equal_nan=True)


def test_running_scales_make_the_unit_of_a_model_indifferent() -> None:
    plugin, scaled = (ensemble(models=("a", "b"), standardize=True, objective="uwo") for _ in range(2))
    more = [[3.0, 0.0, 0.5, NAN], [0.0, 40.0, 0.5, NAN]]
    for rewards in (ROWS, more):
        round = made(rewards)
        louder = dataclasses.replace(round, rewards=round.rewards * torch.tensor([1.0, 100.0, 1.0, 1.0]) + 5)
        ours, theirs = plugin.rewards(round), scaled.rewards(louder)
        torch.testing.assert_close(ours.values[:, 0], theirs.values[:, 0], equal_nan=True, atol=1e-5, rtol=1e-5)
    # both rounds count, with the rows of the second one
    seen = torch.tensor([10.0, 30.0, 20.0, 0.0, 40.0])
    count, mean, squares = plugin.moments["b"]
    assert (count, mean) == (5, 20.0) and squares == pytest.approx(4 * seen.var().item())
    before = dict(plugin.moments)
    plugin.rewards(made(mode="eval"))
    assert plugin.moments == before


def test_models_of_different_weight_are_refused_in_a_round_too() -> None:
    with refused(UsageError, "rm-ensemble: the models have the reward_weights 2, 0.25, and", "Give all of them"):
        ensemble(models=("a", "form")).rewards(made())


def test_wrong_settings_are_refused_before_the_model_is_loaded(build: Any) -> None:
    def builds(options: dict[str, Any], **settings: Any) -> None:
        with trl_ext.enable("rm-ensemble", **{"rm-ensemble": options}):
            build(cls=unloadable("grpo"), **settings)

    with refused(trl_ext.ConfigError, "no reward function is called 'judge'", "Correct rm-ensemble.models"):
        builds({"models": ["digits", "judge"]})
    with refused(OptionError, "models names digits twice; name each model once."):
        builds({"models": ["digits", "digits"]})
    with refused(trl_ext.ConfigError, "a reward is called 'brevity' already. Set rm-ensemble.column"):
        builds({"models": ["digits"], "column": "brevity"})
    with refused(trl_ext.ConfigError, "have the reward_weights 1, 0.5, and their ensemble", "in reward_weights."):
        builds({}, reward_weights=[1.0, 0.5])


def test_a_single_model_is_warned_of(build: Any) -> None:
    with trl_ext.enable("rm-ensemble", **{"rm-ensemble": {"models": ["digits"]}}):
        notes = build()._trl_ext.plan.notes
    assert notes == ("rm-ensemble: digits is the only model, so nothing is combined",)
