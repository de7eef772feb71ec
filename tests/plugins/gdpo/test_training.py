"""GDPO in real runs, against TRL's own aggregation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_plugins.gdpo import decoupled_sum, gdpo_advantages


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def rounds(trainer: Any) -> list[Any]:
    return trainer._trl_ext.plugins["look"].rounds


def noisy(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 11) - 5 for ids in completion_ids]


def test_a_run_equals_trls_own_normalize_then_sum(train: Any) -> None:
    common = {"rewards": [digits, brevity, noisy], "reward_weights": [1.0, 2.0, 0.5], "max_steps": 5, "optim": "sgd"}
    common |= {"learning_rate": 0.1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    stock = train(multi_objective_aggregation="normalize_then_sum", **common)
    plain = train(**common)
    with trl_ext.enable("gdpo"):
        ours = train(**common)
    for key in ("loss", "grad_norm", "reward", "entropy"):
        assert logged(ours, key) == pytest.approx(logged(stock, key), abs=2e-5), key
    assert list(ours._logs["advantages"]) == pytest.approx(list(stock._logs["advantages"]), abs=1e-4)
    assert list(ours._logs["completion"]) == list(stock._logs["completion"])
    others, plains = dict(stock.model.named_parameters()), dict(plain.model.named_parameters())
    for name, value in ours.model.named_parameters():
        torch.testing.assert_close(value, others[name], atol=1e-5, rtol=0)
    assert max((value - plains[name]).abs().max() for name, value in ours.model.named_parameters()) > 1e-3


def test_the_rounding_trap_in_real_trainers(train: Any) -> None:
    """Rewards that are constant in every group: TRL's own aggregation trains on noise, GDPO on nothing."""
    values = (0.1, 0.3, 0.7)

    def first(index: list[int], **kwargs: Any) -> list[float]:
        return [values[i % 3] for i in index]

    def second(index: list[int], **kwargs: Any) -> list[float]:
        return [values[i // 2 % 3] for i in index]

    worst = 0.0
    for size in (6, 7):
        common = {"rewards": [first, second], "num_generations": size, "per_device_train_batch_size": 8 * size}
        common |= {"max_steps": 1, "max_completion_length": 2}
        stock = train(multi_objective_aggregation="normalize_then_sum", **common)
        with trl_ext.enable("gdpo"):
            ours = train(**common)
        worst = max(worst, *(abs(value) for value in stock._logs["advantages"]))
        assert set(ours._logs["advantages"]) == {0.0}
        assert logged(ours, "grad_norm") == [0.0] and logged(ours, "frac_reward_zero_std") == [1.0]
        assert logged(ours, "gdpo/zero_std/first") == logged(ours, "gdpo/zero_std/second") == [1.0]
    assert worst > 0.5


def test_whitening_over_tokens_in_a_real_run(train: Any, look: str) -> None:
    with trl_ext.enable("gdpo", look, gdpo={"whiten": "token"}):
        trainer = train(max_steps=4, rewards=[digits, noisy], learning_rate=0.05)
        seen = rounds(trainer)
    lengths = [round.loss_mask.sum(1) for round in seen]
    assert any(len(set(found.tolist())) > 1 for found in lengths)
    for round, found in zip(seen, lengths, strict=True):
        values = decoupled_sum(round.rewards, round.reward_weights, round.group_ids)
        tokens = values.repeat_interleave(found)
        expected = (values - tokens.mean()) * torch.rsqrt(tokens.var() + 1e-8)
        torch.testing.assert_close(round.advantages, expected.float(), atol=1e-4, rtol=0)


def test_without_the_last_step(train: Any, look: str) -> None:
    with trl_ext.enable("gdpo", look, gdpo={"batch_norm": False, "group_eps": 1e-6}):
        trainer = train(max_steps=1)
        (round,) = rounds(trainer)
    expected = decoupled_sum(round.rewards, round.reward_weights, round.group_ids, eps=1e-6)
    torch.testing.assert_close(round.advantages, expected.float())


@pytest.mark.parametrize("policy", ["exclude", "zero"])
def test_rewards_that_do_not_apply_in_a_real_run(policy: str, train: Any, look: str) -> None:
    def even(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else value for i, value in enumerate(digits(completions))]

    def most(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
        return [None if i == 3 else value for i, value in enumerate(noisy(completion_ids))]

    with trl_ext.enable("gdpo", look, gdpo={"nan_policy": policy}):
        trainer = train(rewards=[even, most], max_steps=2)
        seen = rounds(trainer)
    for round in seen:
        assert torch.isnan(round.rewards[3]).all() and torch.isnan(round.rewards[1, 0])
        expected = gdpo_advantages(round.rewards.double(), torch.ones(2), round.group_ids, nan_policy=policy)
        torch.testing.assert_close(round.advantages.double(), expected, atol=1e-5, rtol=0)
        assert (round.advantages[3] == 0) == (policy == "exclude")
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_equal_to_trl_with_nan_rewards_too(train: Any) -> None:
    def even(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [None if i % 3 == 1 else value for i, value in enumerate(digits(completions))]

    common = {"rewards": [even, noisy], "max_steps": 1}
    stock = train(multi_objective_aggregation="normalize_then_sum", **common)
    with trl_ext.enable("gdpo"):
        ours = train(**common)
    assert list(ours._logs["advantages"]) == pytest.approx(list(stock._logs["advantages"]), abs=1e-4)


def test_evaluation_has_its_own_group_size(build: Any, look: str) -> None:
    with trl_ext.enable("gdpo", look):
        extra = {"eval_dataset": tiny_data().select([0, 1])}
        trainer = build(trainer=extra, num_generations_eval=2, max_steps=1, rewards=[digits, noisy])
        trainer.train()
        trainer.evaluate()
        seen = rounds(trainer)
    last = seen[-1]
    assert last.mode == "eval" and last.group_ids.tolist() == [0, 0, 1, 1]
    expected = gdpo_advantages(last.rewards, last.reward_weights, last.group_ids)
    torch.testing.assert_close(last.advantages, expected)
    assert logged(trainer, "eval_gdpo/zero_std/noisy")


def test_a_group_of_one_in_evaluation_gives_nothing(build: Any, look: str) -> None:
    with trl_ext.enable("gdpo", look):
        trainer = build(trainer={"eval_dataset": tiny_data().select([0, 1])}, num_generations_eval=1, max_steps=1)
        trainer.train()
        trainer.evaluate()
        assert rounds(trainer)[-1].advantages.tolist() == [0.0, 0.0]
