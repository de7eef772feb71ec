"""TRPA: real runs against its exact advantage form, and what must not change a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.losses import sequence_log_ratio

LN2 = math.log(2)


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def exact_advantages(
    rho: list[float], levels: list[float], groups: list[int], beta: float = 0.1, anisotropy: float = 2.5
) -> list[float]:
    """A_i = -N * dL_pref / d rho_i by the formula: what a stock loss needs to have the same gradient."""
    n = len(rho)
    total, count = [0.0] * n, 0
    for i in range(n):
        for j in range(n):
            if groups[i] == groups[j] and levels[i] < levels[j]:
                c = beta * anisotropy if levels[i] == 1 else beta
                weight = c * sigmoid(-c * (rho[i] - rho[j]))
                total[i] += weight
                total[j] -= weight
                count += 1
    return [n * value / max(count, 1) for value in total]


def preference_level(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [1 + sum(ids) % 4 for ids in completion_ids]


def with_gaps(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if sum(ids) % 5 == 4 else 1 + sum(ids) % 5 for ids in completion_ids]


with_gaps.__name__ = "preference_level"
SGD = {"optim": "sgd", "learning_rate": 2.0, "rewards": [preference_level]}


class Exact(Plugin):
    """The advantage form: right for one update per rollout."""

    name = "exact"
    trainers = ("grpo",)
    claims = ("estimator",)
    needs = ("old_logps", "ref_logps")

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        old, reference = (round.batch[f"{name}_per_token_logps"] for name in ("old", "ref"))
        rho = round.trainer.gather(sequence_log_ratio(old, reference, round.loss_mask)).tolist()
        return torch.tensor(exact_advantages(rho, round.rewards[:, 0].tolist(), round.group_ids.tolist()))


def test_with_one_update_per_rollout_a_run_is_that_of_its_advantage_form(train: Any, plugin: Any, build: Any) -> None:
    common = SGD | {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    with trl_ext.enable(plugin(Exact)):
        stock = train(loss_type="grpo", **common)
    with trl_ext.enable("trpa"):
        ours = train(**common)
    assert list(ours._logs["completion"]) == list(stock._logs["completion"])
    assert logged(ours, "grad_norm") == pytest.approx(logged(stock, "grad_norm"), rel=1e-3)
    assert_close_training(stock, ours, 2e-5)
    assert max(logged(ours, "trpa/kl_sampling")) == 0 and logged(ours, "trpa/preference_loss")[0] == pytest.approx(LN2)
    fresh = dict(build().model.named_parameters())
    assert max((value - fresh[name]).abs().max() for name, value in ours.model.named_parameters()) > 1e-2


class Tools(Plugin):
    """Calls every third token the result of a tool."""

    name = "tools"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        result = generate(prompts)
        mask = [[int(t % 3 != 1) for t in range(len(ids))] for ids in result.completion_ids]
        return dataclasses.replace(result, tool_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_accumulation_trains_alike(masked: bool, train: Any, plugin: Any) -> None:
    """Also with different numbers of pairs and tokens in the micro-batches, and several updates per rollout."""
    common = SGD | {"rewards": [with_gaps], "max_steps": 4, "num_iterations": 2}
    with trl_ext.enable("trpa", *([plugin(Tools)] if masked else []), trpa={"tr_kl_coef": 0.5}):
        whole = train(per_device_train_batch_size=16, **common)
        split = train(per_device_train_batch_size=4, gradient_accumulation_steps=4, **common)
    assert len(set(logged(split, "trpa/pairs"))) > 1 and max(logged(split, "trpa/kl_sampling")) > 1e-5
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert_close_training(whole, split, 2e-5)


def test_a_larger_coefficient_keeps_the_policy_closer(train: Any) -> None:
    found = []
    for coefficient in (0.0, 1.0, 10.0):
        with trl_ext.enable("trpa", trpa={"tr_kl_coef": coefficient, "beta": 1.0}):
            trainer = train(num_iterations=8, max_steps=8, rewards=[preference_level], learning_rate=3e-3)
        kl = logged(trainer, "trpa/kl_sampling")
        assert kl[0] == 0 and kl[-1] > 0
        found.append(kl[-1])
    assert found[0] > 1.2 * found[1] > 1.2 * 1.2 * found[2]


def test_a_run_does_not_see_what_levels_are_called(train: Any) -> None:
    def other(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [(1.0, 7.0, 8.0, 1000.0)[sum(ids) % 4] for ids in completion_ids]

    with trl_ext.enable("trpa"):
        plain = train(rewards=[preference_level], num_iterations=2, max_steps=4)
    with trl_ext.enable("trpa", trpa={"level_reward": "other"}):
        renamed = train(rewards=[other], num_iterations=2, max_steps=4)
    for one, two in zip(plain.model.parameters(), renamed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_levels_by_rules_in_a_real_run(train: Any) -> None:
    def level(completions: list[Any], completion_ids: list[list[int]], **kwargs: Any) -> list[int]:
        shares, lengths = digits(completions), brevity(completion_ids)
        return [
            1 if share >= 0.2 and length >= 0.12 else 2 if share >= 0.1 else 3
            for share, length in zip(shares, lengths, strict=True)
        ]

    level.__name__ = "preference_level"
    rules = [{"digits": 0.2, "brevity": 0.12}, {"digits": 0.1}]
    common = {"max_steps": 3, "learning_rate": 0.02}
    with trl_ext.enable("trpa", trpa={"levels": rules}):
        by_rules = train(**common)
    with trl_ext.enable("trpa"):
        by_function = train(rewards=[level], **common)
    assert min(logged(by_rules, "trpa/pairs")) > 0
    for one, two in zip(by_rules.model.parameters(), by_function.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_masked_truncated_completions_and_a_round_of_nothing_else(train: Any) -> None:
    common = {"mask_truncated_completions": True, "rewards": [preference_level]}
    with trl_ext.enable("trpa"):
        mixed = train(max_steps=4, max_completion_length=48, **common)
        nothing = train(max_steps=1, max_completion_length=2, **common)
    assert all(math.isfinite(loss) for loss in logged(mixed, "loss"))
    assert logged(nothing, "loss") == [0.0] and logged(nothing, "grad_norm") == [0.0]
    assert logged(nothing, "trpa/fallback") == [1.0]


def test_adapters_and_shared_prefixes(train: Any) -> None:
    from peft import LoraConfig

    common = SGD | {"max_steps": 3, "num_iterations": 3, "learning_rate": 10.0}
    for trainer in ({}, {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}):
        torch.manual_seed(0)  # before 1.16, TRL makes adapters from the random state that it finds
        with trl_ext.enable("trpa"):
            dense = train(trainer=trainer, **common)
        torch.manual_seed(0)
        with trl_ext.enable("trpa", "shared-prefix"):
            packed = train(trainer=trainer, **common)
        assert logged(dense, "trpa/kl_reference")[0] == pytest.approx(0, abs=1e-6)
        assert logged(dense, "trpa/kl_reference")[-1] > 1e-4
        assert min(logged(packed, "shared-prefix/token_ratio")) > 1.1
        assert_close_training(dense, packed, 5e-5)


def test_evaluation(build: Any) -> None:
    with trl_ext.enable("trpa"):
        trainer = build(
            trainer={"eval_dataset": tiny_data().select([0, 1])},
            num_generations_eval=2,
            per_device_eval_batch_size=4,
            max_steps=1,
            rewards=[preference_level],
        )
        trainer.train()
        trainer.evaluate()
    assert math.isfinite(logged(trainer, "eval_loss")[0]) and logged(trainer, "eval_trpa/pairs")[0] <= 2
