"""TRPA: its mathematics against loops and against DPO, and real runs against its exact advantage form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext.testing import brevity, digits, tiny_data
from trl_ext_hooks import Loss, Plugin, hookimpl
from trl_ext_plugins.trpa import (
    TRPA,
    log_ratio,
    pair_factors,
    preference_losses,
    preference_pairs,
    rule_levels,
    trust_region,
    unary_losses,
)

NAN = math.nan
LN2 = math.log(2)
SEEDS = st.integers(0, 10_000)
LEVELS = st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, NAN]), min_size=1, max_size=9)


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


def preference(rho: torch.Tensor, levels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    pairs = preference_pairs(levels, groups)
    return preference_losses(rho, pairs, pair_factors(levels, pairs, 0.1, 2.5)).mean()


# --- the mathematics --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(LEVELS, SEEDS)
def test_pairs_and_gradient_are_those_of_the_formula(levels: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 3, (len(levels),), generator=generator)
    values = torch.tensor(levels, dtype=torch.float64)
    pairs = preference_pairs(values, groups)
    expected = {
        (i, j)
        for i in range(len(levels))
        for j in range(len(levels))
        if groups[i] == groups[j] and levels[i] < levels[j]
    }
    assert {tuple(pair) for pair in pairs.tolist()} == expected and len(pairs) == len(expected)
    rho = torch.randn(len(levels), generator=generator, dtype=torch.float64).requires_grad_()
    if not expected:
        return
    (gradient,) = torch.autograd.grad(preference(rho, values, groups), rho)
    advantages = exact_advantages(rho.tolist(), levels, groups.tolist())
    assert gradient.tolist() == pytest.approx([-value / len(levels) for value in advantages], abs=1e-12)
    for group in groups.unique():
        assert sum(a for a, g in zip(advantages, groups, strict=True) if g == group) == pytest.approx(0, abs=1e-12)
        mine = [k for k in range(len(levels)) if groups[k] == group and not math.isnan(levels[k])]
        for k in mine:  # a best row is never pushed down, a worst row never up
            assert levels[k] > min(levels[m] for m in mine) or advantages[k] >= 0
            assert levels[k] < max(levels[m] for m in mine) or advantages[k] <= 0


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.lists(st.integers(2, 50), min_size=3, max_size=3, unique=True))
def test_only_the_order_of_levels_matters(seed: int, others: list[int]) -> None:
    """Any relabelling that keeps the order and level 1, and any order of rows."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(1, 5, (8,), generator=generator).double()
    groups = torch.arange(8) // 4
    rho = torch.randn(8, generator=generator, dtype=torch.float64)
    plain = preference(rho, levels, groups)
    names = torch.tensor([0.0, 1.0, *sorted(others)], dtype=torch.float64)
    torch.testing.assert_close(preference(rho, names[levels.long()], groups), plain, equal_nan=True)
    order = torch.randperm(8, generator=generator)
    torch.testing.assert_close(preference(rho[order], levels[order], groups[order]), plain, equal_nan=True)


def test_two_rows_of_one_token_are_dpo() -> None:
    policy, reference = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-1.5], [-1.2]])
    rho = log_ratio(policy, reference, torch.ones(2, 1))
    pairs = torch.tensor([[0, 1]])
    found = preference_losses(rho, pairs, torch.tensor([0.1]))
    margin = (policy - reference)[0, 0] - (policy - reference)[1, 0]
    torch.testing.assert_close(found[0], -torch.nn.functional.logsigmoid(0.1 * margin))


def test_at_the_reference_every_pair_is_ln_2() -> None:
    levels, groups = torch.tensor([1.0, 1, 2, 4, 3]).double(), torch.zeros(5, dtype=torch.long)
    rho = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = preference(rho, levels, groups)
    assert loss.item() == pytest.approx(LN2)
    (gradient,) = torch.autograd.grad(loss, rho)
    # (wins - losses, weighted by c) / 2 / 9 pairs: rows on level 1 win 3 times with c = 0.25, the others with 0.1
    net = [3 * 0.25, 3 * 0.25, 2 * 0.1 - 2 * 0.25, -2 * 0.25 - 2 * 0.1, 0.1 - 2 * 0.25 - 0.1]
    assert gradient.tolist() == pytest.approx([-value / 18 for value in net])


def test_longer_completions_of_equal_ratios_weigh_the_same_per_token_and_more_in_a_sum() -> None:
    generator = torch.Generator().manual_seed(2)
    logps, reference = torch.randn(2, 3, 4, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    twice = [value.repeat(1, 2) for value in (logps, reference, mask)]
    torch.testing.assert_close(log_ratio(*twice), log_ratio(logps, reference, mask))
    torch.testing.assert_close(log_ratio(*twice, "sum"), 2 * log_ratio(logps, reference, mask, "sum"))


def test_the_trust_region_is_exactly_0_on_policy_and_clamped() -> None:
    logps = torch.randn(3, 4, requires_grad=True)
    kl = trust_region(logps, logps.detach(), torch.ones(3, 4))
    assert kl == 0 and (torch.autograd.grad(kl, logps)[0] == 0).all()
    far = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    kl = trust_region(far, torch.tensor([[4.0, 0.5, 4.0]]), torch.tensor([[1, 1, 0]]))
    assert kl.item() == pytest.approx(10 + math.exp(0.5) - 1.5)
    assert torch.autograd.grad(kl, far)[0].tolist() == [[0.0, pytest.approx(1 - math.exp(0.5)), 0.0]]


def test_a_very_negative_margin_stays_finite() -> None:
    rho = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    loss = preference_losses(rho, torch.tensor([[0, 1]]), torch.tensor([0.25])).sum()
    assert loss.item() == pytest.approx(1000.0)
    assert torch.autograd.grad(loss, rho)[0].tolist() == [-0.25, 0.25]


def test_levels_by_rules() -> None:
    """The authors' four levels, of a format, a readable and a right answer."""
    rewards = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, NAN, 0], [NAN, 0, 0]])
    names = ("format", "readable", "right")
    rules = [{"format": 1, "right": 1}, {"format": 1, "readable": 1}, {"format": 0.5}]
    found = rule_levels(rewards, names, rules)
    torch.testing.assert_close(found, torch.tensor([1, 2, 3, 4, 4, NAN, NAN]), equal_nan=True)
    assert rule_levels(rewards[:, :1], names[:1], [{"format": 1}])[:5].tolist() == [1, 1, 1, 2, 2]


# --- the loss of a micro-batch ----------------------------------------------------------------------------------------


def micro_batch(levels: list[float], groups: list[int] | None = None, drift: float = 0.0, **batch: Any) -> Loss:
    generator = torch.Generator().manual_seed(0)
    shape = (len(levels), 4)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64)
    values, ids = torch.tensor(levels, dtype=torch.float64), torch.tensor(groups or [0] * len(levels))
    mask = batch.get("completion_mask", torch.ones(shape, dtype=torch.long))
    fields = {
        "completion_mask": mask,
        "old_per_token_logps": old,
        "ref_per_token_logps": old - 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64),
        "preference_level": values,
        "trl_ext_group_ids": ids,
        "trpa_pairs": torch.tensor(float(len(preference_pairs(values, ids)))),
        "trpa_rows": (~torch.isnan(values)).sum().double(),
        "trpa_tokens": mask.sum().double(),
    }
    logps = (old + drift * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
    return Loss("train", 0, None, fields | batch, logps, None)


def gradient(loss: Loss, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    value = TRPA(TRPA.Options(**options)).policy_loss(loss=loss).values
    return value.detach(), torch.autograd.grad(value, loss.per_token_logps)[0]


def test_rows_without_a_level_and_uniform_groups_are_skipped() -> None:
    """A group of one, a group on one level, and a row without a level beside a group that has pairs."""
    loss = micro_batch([1, 2, NAN, 3, 3, 1], [0, 0, 0, 1, 1, 2])
    value, found = gradient(loss)
    assert math.isfinite(value) and (found[:2] != 0).all() and (found[2:] == 0).all()


def test_an_empty_completion_is_left_out() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
    value, found = gradient(micro_batch([1, NAN, 2], completion_mask=mask), tr_kl_coef=0.0)
    assert math.isfinite(value) and (found[mask == 0] == 0).all() and (found[mask == 1] != 0).all()


@pytest.mark.parametrize(("level", "sign"), [(1.0, -1), (2.0, 1)])
def test_without_any_pair_rows_go_up_or_down_or_nowhere(level: float, sign: int) -> None:
    loss = micro_batch([level] * 3)
    value, found = gradient(loss)
    rho = log_ratio(loss.per_token_logps, loss.batch["ref_per_token_logps"], loss.mask)
    torch.testing.assert_close(value, unary_losses(rho, loss.batch["preference_level"]).mean())
    assert value.item() == pytest.approx(sum(-math.log(sigmoid(-sign * r)) for r in rho.tolist()) / 3)
    assert (sign * found > 0).all()  # a positive gradient lowers the log-probability
    value, found = gradient(loss, fallback="zero")
    assert value == 0 and (found == 0).all()


def test_a_micro_batch_without_pairs_falls_back_only_if_the_round_has_none() -> None:
    value, found = gradient(micro_batch([1, 1, 1], trpa_pairs=torch.tensor(2.5)))
    assert value == 0 and (found == 0).all()


@pytest.mark.parametrize("kind", ["all rows without a level", "one row alone"])
def test_nothing_to_learn_from_is_a_differentiable_nothing(kind: str) -> None:
    value, found = gradient(micro_batch([NAN, NAN] if "all" in kind else [NAN]))
    assert value == 0 and (found == 0).all()


def test_results_of_tools_do_not_count() -> None:
    tools = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    found = gradient(micro_batch([1, 2], drift=0.3, tool_mask=tools, trpa_tokens=tools.sum().double()))
    expected = gradient(micro_batch([1, 2], drift=0.3, completion_mask=tools))
    torch.testing.assert_close(found, expected)
    assert (found[1][tools == 0] == 0).all()


def test_the_ratio_to_another_sampler_weighs_preferences_and_not_the_trust_region() -> None:
    for ratio in (torch.tensor([[0.0], [1.0], [2.5]]), torch.linspace(0, 3, 12).view(3, 4)):
        (value, plain), (same, found) = (
            gradient(micro_batch([1, 2, 3], drift=0.2, **extra), tr_kl_coef=0.0)
            for extra in ({}, {"importance_sampling_ratio": ratio})
        )
        torch.testing.assert_close((same, found), (value, plain * ratio))
        _, with_kl = gradient(micro_batch([1, 2, 3], drift=0.2, importance_sampling_ratio=ratio), tr_kl_coef=1.0)
        _, kl = gradient(micro_batch([1, 2, 3], drift=0.2), tr_kl_coef=1.0)
        torch.testing.assert_close(with_kl - found, kl - plain)


def test_the_root_form_of_the_trust_region() -> None:
    loss = micro_batch([1, 2], drift=0.4)
    (free, _), (plain, _), (root, _) = (
        gradient(loss, tr_kl_coef=0.0),
        gradient(loss, tr_kl_coef=1.0),
        gradient(loss, tr_kl_coef=1.0, use_sqrt_trkl=True),
    )
    assert (root - free).item() == pytest.approx(math.sqrt((plain - free).item() + 0.25))


# --- real runs --------------------------------------------------------------------------------------------------------


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
        rho = round.trainer.gather(log_ratio(old, reference, round.loss_mask)).tolist()
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


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, "trpa: no reward function is called 'preference_level'. Known: brevity, digits."),
        ({"beta": 0.04}, "trpa replaces the policy loss and does not apply beta=0.04; set beta=0.0"),
        ({"epsilon_high": 0.28}, "does not apply epsilon_high=0.28; set epsilon_high=None"),
        ({"scale_rewards": "batch"}, "does not apply scale_rewards='batch'; set scale_rewards='group'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "does not apply multi_objective_aggregation="),
        ({"top_entropy_quantile": 0.2}, "does not apply top_entropy_quantile=0.2"),
        ({"importance_sampling_level": "sequence"}, "does not apply importance_sampling_level='sequence'"),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, "num_generations=4; use 4 or 8"),
    ],
)
def test_what_it_does_not_apply_is_refused(settings_: dict[str, Any], expected: str, build: Any) -> None:
    from trl import GRPOConfig, GRPOTrainer

    if not all(hasattr(GRPOConfig, name) for name in settings_):
        pytest.skip("this TRL has no such setting")
    with trl_ext.enable("trpa"), pytest.raises(trl_ext.ConfigError) as caught:
        build(cls=lambda **given_: GRPOTrainer(**given_ | {"model": "/no/such/model"}), **settings_)
    assert expected in str(caught.value)


def test_notes(build: Any) -> None:
    with trl_ext.enable("trpa"):
        notes = build(rewards=[digits, preference_level])._trl_ext.plan.notes
        none = build(
            rewards=[digits, preference_level], reward_weights=[2.0, 0.0], num_iterations=2
        )._trl_ext.plan.notes
    assert notes == (
        "trpa: a level is no reward; reward_weights=[1.0, 0.0] keeps it out of the logged `reward`",
        "trpa: with one update per rollout the trust region does nothing; see num_iterations",
    )
    assert none == ()


@pytest.mark.parametrize("value", [0.0, 1.5, -1.0])
def test_something_else_than_a_level(value: float, build: Any) -> None:
    def preference_level(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [1.0] * (len(completion_ids) - 1) + [value]

    with trl_ext.enable("trpa"), pytest.raises(ValueError, match=f"returned {value:g}, expected a preference level"):
        build(rewards=[preference_level]).train()


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"anisotropy": 0.0}, {"tr_kl_coef": -1.0}, {"levels": [{}]}, {"levels": [{"x": "y"}]}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(trl_ext.OptionError, match=next(iter(options))):
        trl_ext.enable("trpa", trpa=options)
