"""Tokens that a plugin leaves out are as if a tool had written them, for every way of averaging a loss."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

import trl_ext
from tests.known_rows import assert_same_training, logged, moved, train_known
from tests.refusals import refused
from trl_ext.testing import metrics_of, tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "sapo", "cispo", "luspo")


def chosen(width: int) -> torch.Tensor:
    """(T,): every third token from the first, so that each row keeps one."""
    return torch.arange(width) % 3 == 0


class Mask(Plugin):
    name = "mask"
    trainers = ("grpo",)
    seen: Any = None

    @hookimpl
    def token_mask(self, round: Any) -> torch.Tensor:
        return chosen(round.loss_mask.shape[1]).expand_as(round.loss_mask)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.seen = round


class ByTools(Plugin):
    """The same tokens, left out by TRL itself."""

    name = "by-tools"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Any:
        result = generate(prompts)
        mask = [chosen(len(ids)).long().tolist() for ids in result.completion_ids]
        return dataclasses.replace(result, tool_mask=mask)


@pytest.fixture
def run(train: Any, plugin: Any) -> Any:
    return functools.partial(train_known, train, plugin)


def metrics(trainer: Any) -> list[dict[str, float]]:
    """What TRL averages over tokens."""
    words = ("entropy", "kl", "clip_ratio", "loss", "grad_norm")
    return [{key: v for key, v in entry.items() if key.startswith(words)} for entry in metrics_of(trainer)]


@pytest.mark.filterwarnings("ignore:.*luspo.*")
@pytest.mark.parametrize("loss_type", LOSSES)
def test_tokens_left_out_are_those_of_a_tool(loss_type: str, run: Any) -> None:
    """With a KL term, in the second of two passes over a round, where ratios are not 1: loss, gradient, metrics."""
    settings = {"loss_type": loss_type, "beta": 0.05, "num_iterations": 2, "learning_rate": 0.05}
    masked, expected = run([Mask], **settings), run([], outer=[ByTools], **settings)
    assert_same_training(masked, expected)
    for one, other in zip(metrics(masked)[:-1], metrics(expected)[:-1], strict=True):
        assert len(one) > 3 and one == pytest.approx(other, abs=1e-6, nan_ok=True)
    if loss_type == LOSSES[0]:  # the comparison can fail
        assert moved(run([], **settings), expected) > 1e-4


class Early(Mask):
    """No token of the second prompt, all of the others."""

    name = "early"

    @hookimpl
    def token_mask(self, round: Any) -> torch.Tensor:
        keep = torch.tensor([row["index"] != 1 for row in round.rows])
        return keep.unsqueeze(1).expand_as(round.loss_mask)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_row_without_a_token_is_a_row_left_out(loss_type: str, run: Any) -> None:
    settings = {"loss_type": loss_type, "beta": 0.05}
    masked, without = run([Early], **settings), run([], (0, 2), **settings)
    assert_same_training(masked, without)
    round = masked.used["early"].seen
    assert round.kept.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert (round.advantages[4:8] == 0).all() and (round.lengths[4:8] == 0).all() and (round.lengths[:4] > 0).all()


def test_plugins_keep_what_all_of_them_keep_and_later_hooks_see_it(run: Any) -> None:
    class Drop(Plugin):
        name = "drop"
        trainers = ("grpo",)

        @hookimpl
        def keep_rows(self, round: Any) -> torch.Tensor:
            return round.group_ids != 0

    class Weigh(Plugin):
        name = "weigh"
        trainers = ("grpo",)
        needs = ("token_advantages",)

        @hookimpl
        def token_weights(self, round: Any) -> torch.Tensor:
            self.counted = round.loss_mask.sum(1), round.lengths, round.batch["num_items_in_batch"]
            return torch.ones(round.loss_mask.shape)

    trainer = run([Drop, Mask, Early, Weigh], loss_type="dapo")
    round, (mask, lengths, items) = trainer.used["mask"].seen, trainer.used["weigh"].counted
    assert round.kept.tolist() == [False] * 8 + [True] * 4
    expected = (round.batch["completion_mask"] * chosen(round.loss_mask.shape[1])).sum(1) * round.kept
    assert mask.tolist() == lengths.tolist() == expected.tolist() and items == expected.sum() > 0
    share = logged(trainer, "mask/tokens_kept")[0]
    counted = round.batch["completion_mask"][4:]  # of the rows that `keep_rows` left
    assert share == pytest.approx(float((counted * chosen(counted.shape[1])).sum() / counted.sum()))


def test_keeping_everything_changes_nothing(run: Any) -> None:
    class All(Plugin):
        name = "all"
        trainers = ("grpo",)

        @hookimpl
        def token_mask(self, round: Any) -> torch.Tensor:
            return torch.ones(round.loss_mask.shape, dtype=torch.bool)

    kept, plain = run([All]), run([])
    assert moved(kept, plain) == 0
    own = [{k: v for k, v in entry.items() if not k.startswith("all/")} for entry in metrics_of(kept)]
    assert own == metrics_of(plain)


@pytest.mark.parametrize("normalisation", ["trainer", "token_mean", "sequence_mean"])
def test_replaced_losses(normalisation: str, run: Any) -> None:
    class Own(Plugin):
        name = "own"
        trainers = ("grpo",)
        honours = ("loss_type",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            return PolicyLoss(-(loss.advantages + 0.3) * loss.per_token_logps, normalisation)

    settings = {"loss_type": "grpo"}
    assert_same_training(run([Own, Mask], **settings), run([Own], outer=[ByTools], **settings))


@pytest.mark.slow
def test_beside_losses_of_pairs_and_beside_shared_prefixes(run: Any) -> None:
    """P3O and TRPA add up the log-ratios of the tokens that are left, and pair the rows that are left."""
    pairs = {"num_iterations": 2, "beta": 0.0, "learning_rate": 0.05}
    for method in ("p3o", {"trpa": {"levels": [{"spread": 1.0}]}}):
        tokens = run([method, Mask], **pairs)
        assert_same_training(tokens, run([method], outer=[ByTools], **pairs))
        assert moved(tokens, run([method], **pairs)) > 1e-4
        assert_same_training(run([method, Early], **pairs), run([method], (0, 2), **pairs))
    shared = {"shared-prefix": {"min_gain": 0}}
    assert_same_training(run([shared, Mask]), run([], outer=[ByTools]), 2e-5)


def test_evaluation_keeps_all_tokens_and_rloo_takes_no_mask(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Mask)):
        trainer = build(trainer={"eval_dataset": tiny_data().select([0, 1])}, max_steps=1, num_generations_eval=2)
        trainer.train()
        trainer.evaluate()
        seen = trainer._trl_ext.plugins["mask"].seen
        assert seen.mode == "eval" and torch.equal(seen.loss_mask, seen.batch["completion_mask"])
        with refused(trl_ext.ConfigError, "plugin 'mask' cannot serve the RLOO trainer"):
            build("rloo")


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda mask: torch.ones(3, dtype=torch.bool), "torch.bool (3,)"),
        (lambda mask: torch.ones(mask.shape), "torch.float32 (8, 8)"),
        (lambda mask: mask.tolist(), "list"),
    ],
    ids=["shape", "dtype", "type"],
)
def test_wrong_answers_are_named(wrong: Any, text: str, train: Any, plugin: Any) -> None:
    class Wrong(Plugin):
        name = "wrong"
        trainers = ("grpo",)

        @hookimpl
        def token_mask(self, round: Any) -> Any:
            return wrong(round.loss_mask)

    expected = f"plugin 'wrong' returned {text} from 'token_mask', expected booleans (8, 8)."
    with trl_ext.enable(plugin(Wrong)), refused(trl_ext.PluginError, expected):
        train()


def test_a_scalar_loss_declares_that_it_leaves_rows_out(run: Any) -> None:
    class Scalar(Plugin):
        name = "scalar"
        trainers = ("grpo",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            return PolicyLoss((loss.per_token_logps * loss.mask).sum())

    with refused(trl_ext.PluginError, "'scalar' returned a scalar from 'policy_loss', and mask leaves rows out"):
        run([Scalar, Mask])
