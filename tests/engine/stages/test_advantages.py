"""Advantages in real trainers: estimator, order, one per row or one per token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer.model.named_parameters())


def assert_equal_training(one: Any, other: Any) -> None:
    for name, value in parameters(one).items():
        assert torch.equal(value, parameters(other)[name]), name


class MeanOnly(Plugin):
    name = "mean-only"
    trainers = ROUNDS
    claims = ("estimator",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        total = (round.rewards * round.reward_weights).nansum(1)
        self.mine = group_normalize(total, round.group_ids, scale=False)
        return self.mine


class PlusOne(Plugin):
    name = "plus-one"
    trainers = ROUNDS

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.before = round.advantages
        return round.advantages + 1


class Twice(Plugin):
    name = "twice"
    trainers = ROUNDS

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return 2 * round.advantages

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.final, self.batch = round.advantages, round.batch["advantages"]


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_estimator_comes_first_then_the_given_order(kind: str, order: Any, build: Any, plugin: Any) -> None:
    references = [plugin(MeanOnly), plugin(PlusOne), plugin(Twice)]
    with trl_ext.enable(*(references[i] for i in order)):
        trainer = build(kind, max_steps=1)
        trainer.train()
        base, plus, twice = (own(trainer, name) for name in ("mean-only", "plus-one", "twice"))
    added_first = order.index(1) < order.index(2)
    expected = 2 * (base.mine + 1) if added_first else 2 * base.mine + 1
    torch.testing.assert_close(twice.final, expected)
    torch.testing.assert_close(twice.batch, expected)
    torch.testing.assert_close(plus.before, base.mine if added_first else 2 * base.mine)
    change = logged(trainer, "plus-one/advantage_change")
    assert change == [pytest.approx(1.0)]
    assert list(trainer._logs["advantages"]) == pytest.approx(expected.tolist())
    used = trainer._buffered_inputs[0]["advantages"]
    assert sorted(used.tolist()) == pytest.approx(sorted(expected.tolist()))


def test_the_logged_share_of_silent_groups_follows_the_advantages_used(build: Any, plugin: Any) -> None:
    class SilenceFirst(Plugin):
        name = "silence-first"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            return torch.where(round.group_ids == 0, 0.0, round.advantages)

    plain = build(max_steps=1)
    plain.train()
    with trl_ext.enable(plugin(SilenceFirst)):
        trainer = build(max_steps=1)
        trainer.train()
    assert logged(plain, "frac_reward_zero_std") == [0.0]
    assert logged(trainer, "frac_reward_zero_std") == [0.5]


class Spread(Plugin):
    """The row's advantage on each of its tokens, which must train as the row's advantage does."""

    name = "spread"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        rows = round.advantages[round.local].unsqueeze(1)
        return rows.expand(-1, round.loss_mask.shape[1])


def test_token_wise_copies_of_row_advantages_train_bit_identically(build: Any, plugin: Any) -> None:
    settings = {"max_steps": 3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    plain = build(**settings)
    plain.train()
    with trl_ext.enable(plugin(Spread)):
        trainer = build(**settings, log_completions=True)
        trainer.train()
    assert_equal_training(plain, trainer)
    assert trainer._buffered_inputs[0]["advantages"].dim() == 2
    assert list(trainer._logs["advantages"]) == pytest.approx(list(plain._logs["advantages"]))
    assert logged(trainer, "frac_reward_zero_std") == logged(plain, "frac_reward_zero_std")


class LastToken(Plugin):
    """All credit on the last token that counts."""

    name = "last-token"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        positions = torch.arange(round.loss_mask.shape[1])
        last = positions == round.loss_mask.sum(1, keepdim=True) - 1
        return round.advantages[round.local].unsqueeze(1) * last

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.round = round


class HalveTokens(Plugin):
    name = "halve-tokens"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        assert round.advantages.dim() == 2
        return 0.5 * round.token_advantages


def test_token_wise_advantages_reach_the_loss_and_the_log_shows_their_mean(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(LastToken), plugin(HalveTokens)):
        trainer = build(max_steps=1, log_completions=True)
        trainer.train()
        round = own(trainer, "last-token").round
    assert round.advantages.shape == round.loss_mask.shape
    assert ((round.advantages != 0).sum(1) <= 1).all() and (round.advantages != 0).any()
    means = round.advantages.sum(1) / round.loss_mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(means.tolist())
    batch = trainer._buffered_inputs[0]
    assert (batch["advantages"] * (1 - batch["completion_mask"]) == 0).all()
    plain = build(max_steps=1)
    plain.train()
    assert logged(plain, "grad_norm") != pytest.approx(logged(trainer, "grad_norm"), rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.ones(8), r"\(8,\)"),
        ("text", "str"),
        (torch.full((8, 8), torch.nan), "weights that are not finite: 64 of 64"),
    ],
)
def test_wrong_weights_are_named(wrong: Any, text: str, train: Any, plugin: Any) -> None:
    class Wrong(Plugin):
        name = "wrong"
        trainers = ("grpo",)

        @hookimpl
        def token_weights(self, round: Any) -> Any:
            return wrong

    with trl_ext.enable(plugin(Wrong)), pytest.raises(trl_ext.PluginError, match=f"'wrong' returned .*{text}"):
        train()
