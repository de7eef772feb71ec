"""Rows that a plugin leaves out are as if they had never been sampled, for every way of averaging a loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import trl_ext
from tests.known_rows import assert_same_training, logged, moved, train_known
from trl_ext.engine.stages import kept_rows
from trl_ext.testing import metrics_of, tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl

LOSSES = ("dapo", "grpo", "dr_grpo", "sapo", "cispo", "luspo")
DROPPED = 1  # index of the prompt that is left out


class Drop(Plugin):
    name = "drop"
    trainers = ("grpo", "rloo")
    seen: Any = None

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        own = torch.tensor([row["index"] != DROPPED for row in round.rows])
        return round.trainer.gather(own)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.seen = round


@pytest.fixture
def run(train: Any, plugin: Any) -> Any:
    return functools.partial(train_known, train, plugin)


@pytest.mark.filterwarnings("ignore:.*luspo.*")
@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_dropped_group_is_as_if_it_had_not_been_sampled(loss_type: str, run: Any) -> None:
    settings = {"loss_type": loss_type, "beta": 0.05}
    without = run([], (0, 2), **settings)
    dropped = run([Drop], **settings)
    assert_same_training(dropped, without)
    if loss_type == LOSSES[0]:  # the comparison can fail
        assert moved(run([], **settings), without) > 1e-4
    assert logged(dropped, "grad_norm") == pytest.approx(logged(without, "grad_norm"), rel=1e-4)


def test_rloo_too(run: Any) -> None:
    without = run([], (0, 2), kind="rloo", beta=0.05)
    dropped = run([Drop], kind="rloo", beta=0.05)
    assert_same_training(dropped, without)
    assert moved(run([], kind="rloo", beta=0.05), without) > 1e-4


def test_bnpo_weighs_micro_batches_by_what_they_keep(run: Any) -> None:
    """Whole groups per micro-batch, so that the split of the kept rows is the same."""

    class Whole(Plugin):
        name = "whole"
        trainers = ("grpo",)
        needs = ("whole_groups",)

        @hookimpl
        def loss_metrics(self, loss: Any) -> None:
            assert len(set(loss.batch["trl_ext_group_ids"].tolist())) == 1

    without = run([Whole], (0, 2), loss_type="bnpo")
    assert_same_training(run([Drop, Whole], loss_type="bnpo"), without)


def test_the_weights_of_micro_batches_add_up() -> None:
    kept = torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1]).bool()
    batches = [{kept_rows.KEPT: part, kept_rows.SCALE: torch.tensor(12 / 7)} for part in kept.view(3, 4)]
    weights = [float(kept_rows.weight(batch, "micro_batch")) for batch in batches]
    assert weights == pytest.approx([3 / 4 * 12 / 7, 0, 12 / 7]) and sum(weights) == pytest.approx(3)
    assert float(kept_rows.weight(batches[0], "rows")) == pytest.approx(12 / 7)
    assert kept_rows.weight(batches[0], "tokens") is None
    assert kept_rows.weight({}, "rows") is None


class KeepAll(Plugin):
    name = "keep-all"
    trainers = ("grpo", "rloo")

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return torch.ones(len(round.group_ids), dtype=torch.bool)


class KeepNone(Plugin):
    name = "keep-none"
    trainers = ("grpo", "rloo")

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        return torch.zeros(len(round.group_ids), dtype=torch.bool)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_keeping_everything_changes_nothing(kind: str, run: Any) -> None:
    plain, kept = run([], kind=kind), run([KeepAll], kind=kind)
    assert moved(plain, kept) == 0
    own = [{k: v for k, v in entry.items() if not k.startswith("keep-all/")} for entry in metrics_of(kept)]
    assert own == metrics_of(plain)
    assert logged(kept, "keep-all/rows_kept") == [1.0] * 2


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
def test_keeping_nothing_trains_nothing(loss_type: str, run: Any) -> None:
    none, start = run([KeepNone], loss_type=loss_type, beta=0.05), run([], loss_type=loss_type, learning_rate=0.0)
    assert moved(none, start) == 0
    assert logged(none, "loss") == [0.0] * 2 and logged(none, "grad_norm") == [0.0] * 2
    assert set(none._logs["advantages"]) == {0.0}


def test_a_row_stays_if_every_plugin_keeps_it(run: Any) -> None:
    class First(Plugin):
        name = "first"
        trainers = ("grpo",)

        @hookimpl
        def keep_rows(self, round: Any) -> torch.Tensor:
            return round.group_ids != 0

    trainer = run([Drop, First])
    round = trainer.used["drop"].seen
    assert round.loss_mask.sum(1).bool().tolist() == [False] * 8 + [True] * 4
    assert (round.advantages[:8] == 0).all() and (round.advantages[8:] != 0).any()
    assert round.batch["num_items_in_batch"] == round.loss_mask.sum() == round.batch["completion_mask"][8:].sum()
    assert list(trainer._logs["advantages"])[:8] == [0.0] * 8
    assert logged(trainer, "drop/rows_kept")[0] == pytest.approx(2 / 3)
    assert logged(trainer, "frac_reward_zero_std")[-1] == pytest.approx(2 / 3)
    assert_same_training(trainer, run([], (2,)))


def test_token_wise_advantages_and_tool_results(run: Any) -> None:
    class Tokens(Plugin):
        """Token-wise advantages, and a masked token as after a tool call."""

        name = "tokens"
        trainers = ("grpo",)

        @hookimpl
        def rollout(self, prompts: list[Any], generate: Any) -> Any:
            result = generate(prompts)
            return dataclasses.replace(result, tool_mask=[[1] * len(ids) for ids in result.completion_ids])

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            steps = torch.arange(round.loss_mask.shape[1]) % 3
            return round.advantages[round.local].unsqueeze(1) * steps

    dropped = run([Tokens, Drop])
    round = dropped.used["drop"].seen
    assert (round.advantages[4:8] == 0).all() and (round.batch["tool_mask"][4:8] == 0).all()
    lengths = round.batch["completion_mask"].sum(1)
    assert torch.equal(round.loss_mask.sum(1)[:4], lengths[:4] - 1)
    assert_same_training(dropped, run([Tokens], (0, 2)))


@pytest.mark.parametrize("normalisation", ["trainer", "token_mean", "sequence_mean"])
def test_replaced_losses(normalisation: str, run: Any) -> None:
    class Own(Plugin):
        name = "own"
        trainers = ("grpo",)
        needs = ("whole_groups",)
        honours = ("loss_type",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            return PolicyLoss(-(loss.advantages + 0.3) * loss.per_token_logps, normalisation)

    settings = {"loss_type": "grpo"}
    assert_same_training(run([Own, Drop], **settings), run([Own], (0, 2), **settings))


def test_a_replaced_loss_that_is_a_scalar(run: Any) -> None:
    class Scalar(Plugin):
        name = "scalar"
        trainers = ("grpo",)
        needs = ("whole_groups",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            total = (loss.advantages * loss.per_token_logps * loss.mask).sum()
            return PolicyLoss(-total / loss.mask.sum().clamp(min=1))

    class Aware(Scalar):
        name = "aware"
        honours = ("keep_rows",)

    with pytest.raises(trl_ext.PluginError, match="'scalar' returned a scalar from 'policy_loss', and drop leaves"):
        run([Scalar, Drop])
    assert_same_training(run([Aware, Drop]), run([Scalar], (0, 2)))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_terms_beside_the_loss(loss_type: str, run: Any) -> None:
    """Those per token are averaged over what is kept, like the loss; a scalar is the plugin's own business."""

    class Tokens(Plugin):
        name = "tokens"
        trainers = ("grpo",)

        @hookimpl
        def loss_terms(self, loss: Any) -> dict[str, PolicyLoss]:
            return {"pull": PolicyLoss(-0.3 * loss.per_token_logps)}

    class One(Plugin):
        name = "one"
        trainers = ("grpo",)

        @hookimpl
        def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
            return {"constant": torch.tensor(1.0)}

    settings = {"loss_type": loss_type}
    dropped, without = run([Tokens, Drop], **settings), run([Tokens], (0, 2), **settings)
    assert_same_training(dropped, without)
    assert moved(without, run([], (0, 2), **settings)) > 1e-4
    shifted = run([Tokens, Drop, One], **settings)
    assert logged(shifted, "one/constant") == pytest.approx([1.0] * 2)
    assert logged(shifted, "loss") == pytest.approx([loss + 1 for loss in logged(dropped, "loss")], abs=1e-5)


def test_evaluation_keeps_all_rows(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Drop)):
        trainer = build(trainer={"eval_dataset": tiny_data().select([0, 1])}, max_steps=1)
        trainer.train()
        trainer.evaluate()
        seen = trainer._trl_ext.plugins["drop"].seen
    assert seen.mode == "eval" and seen.loss_mask.sum(1).bool().all()


def test_terms_with_a_mean_of_their_own_are_refused_where_the_loss_is_scaled(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Drop)):
        with pytest.raises(trl_ext.ConfigError, match=r"entropy bonus.*loss_type='dapo'"):
            build(entropy_coef=0.01, loss_type="grpo")
        build(entropy_coef=0.01, loss_type="dapo")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.ones(3, dtype=torch.bool), r"torch.bool \(3,\)"),
        (torch.ones(8), r"torch.float32 \(8,\)"),
        ([True] * 8, "list"),
    ],
    ids=["shape", "dtype", "type"],
)
def test_wrong_answers_are_named(wrong: Any, text: str, train: Any, plugin: Any) -> None:
    class Wrong(Plugin):
        name = "wrong"
        trainers = ("grpo",)

        @hookimpl
        def keep_rows(self, round: Any) -> Any:
            return wrong

    with (
        trl_ext.enable(plugin(Wrong)),
        pytest.raises(
            trl_ext.PluginError, match=rf"'wrong' returned {text} from 'keep_rows', expected booleans \(8,\)"
        ),
    ):
        train()


class Weighs(Plugin):
    """Gives a row's first token as much of the loss as all others, by counts of what the loss counts."""

    name = "weighs"
    trainers = ("grpo",)
    needs = ("token_advantages",)

    @hookimpl
    def token_weights(self, round: Any) -> torch.Tensor:
        first = (round.loss_mask.cumsum(1) == 1) & (round.loss_mask != 0)
        share = round.trainer.gather(first.sum()).sum() / round.batch["num_items_in_batch"]
        return torch.where(first, 1 / share, 1 / (1 - share)).double()


def test_weights_of_tokens_count_what_is_left(run: Any) -> None:
    without, dropped = run([Weighs], (0, 2)), run([Weighs, Drop])
    assert_same_training(dropped, without)
    assert moved(without, run([], (0, 2))) > 1e-4
    assert logged(without, "weighs/advantage_change")
