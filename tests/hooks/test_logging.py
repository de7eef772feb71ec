"""`round.log`, `loss.log` and `pairs.log` from hooks of real trainers, against the hooks that return metrics."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from packaging.version import Version

import trl_ext
from trl_ext import PluginError
from trl_ext.trl_internals.seams import trl_version
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl

ROUNDS = ("grpo", "rloo")


def metrics(trainer: Any) -> dict[str, float]:
    return {key: value for entry in trainer.state.log_history for key, value in entry.items()}


class EveryHook(Plugin):
    """Logs from each hook of a round and of a micro-batch, and returns the same values where a hook is for that."""

    name = "every-hook"
    trainers = ROUNDS
    fields = ("shout", "carried")

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, Any]:
        rollout.log("rows", float(len(rollout.rows)))
        return {"shout": [1.0] * len(rollout.rows)}

    @hookimpl
    def rewards(self, scored: Any) -> None:
        scored.log("reward", scored.total_reward)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        round.log("length", round.lengths)
        return round.advantages * 0.5

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        round.log("share", round.loss_mask.sum(), round.loss_mask.numel())
        return {"carried": round.total_reward[round.local]}

    @hookimpl
    def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
        length = round.loss_mask.sum(1).double()
        return {"length_returned": (length.sum().item(), len(length))}

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        loss.log("logp", loss.per_token_logps * loss.mask)
        return PolicyLoss(-loss.advantages * loss.per_token_logps)

    @hookimpl
    def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
        values = (loss.per_token_logps * loss.mask).double()
        return {"logp_returned": (values.sum().item(), values.numel())}


@pytest.mark.parametrize("kind", ROUNDS)
def test_what_is_logged_equals_what_is_returned(kind: str, train: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(EveryHook)):
        found = metrics(train(kind, beta=0.0))
    assert found["every-hook/rows"] == 8.0
    assert found["every-hook/reward"] == pytest.approx(found["reward"])
    assert found["every-hook/length"] == found["every-hook/length_returned"] > 0
    assert found["every-hook/logp"] == pytest.approx(found["every-hook/logp_returned"])
    assert 0 < found["every-hook/share"] <= 1


class RewardsOnly(Plugin):
    name = "rewards-only"
    trainers = ROUNDS

    @hookimpl
    def rewards(self, scored: Any) -> None:
        scored.log("first", scored.reward())


def test_a_plugin_without_a_later_hook_is_heard(train: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(RewardsOnly)):
        assert "rewards-only/first" in metrics(train("grpo"))


class Other(RewardsOnly):
    name = "other"

    @hookimpl
    def rewards(self, scored: Any) -> None:
        scored.log("first", 7.0)


def test_each_plugin_logs_under_its_own_name(train: Any, plugin: Any) -> None:
    with trl_ext.enable({plugin(RewardsOnly): None, plugin(Other): None}):
        found = metrics(train("grpo"))
    assert found["other/first"] == 7.0 and found["rewards-only/first"] != 7.0


class Twice(RewardsOnly):
    name = "twice"

    @hookimpl
    def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
        return {"first": (1.0, 1.0)}


def test_one_name_both_ways_is_refused(train: Any, plugin: Any) -> None:
    expected = "plugin 'twice' logged 'first' and returned a metric or a loss term of that name too. Report it once"
    with pytest.raises(PluginError, match=re.escape(expected)), trl_ext.enable(plugin(Twice)):
        train("grpo")


class Pairwise(Plugin):
    name = "pairwise"
    trainers = ("dpo",)

    @hookimpl
    def pair_batch(self, pairs: Any) -> None:
        pairs.log("tokens", pairs.mask.sum(), len(pairs.rows))


class WithMetrics(Pairwise):
    name = "with-metrics"

    @hookimpl
    def pair_metrics(self, pairs: Any) -> dict[str, tuple[float, float]]:
        pairs.log("scored", pairs.per_token_logps[pairs.mask])
        return {"returned": (pairs.per_token_logps.double().sum().item(), pairs.mask.sum().item())}


def test_pairs_log_too(train: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Pairwise)):
        assert metrics(train("dpo"))["pairwise/tokens"] > 0


@pytest.mark.skipif(trl_version() < Version("1.15"), reason="before TRL 1.15 nobody sees the forwards of pairs")
def test_scored_pairs_log_too(train: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(WithMetrics)):
        found = metrics(train("dpo"))
    assert found["with-metrics/scored"] == pytest.approx(found["with-metrics/returned"])
