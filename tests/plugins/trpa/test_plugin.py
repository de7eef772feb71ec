"""TRPA: the loss of a micro-batch, rows that are left out, and settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import digits
from trl_ext_hooks import Loss
from trl_ext_hooks.toolkit.losses import sequence_log_ratio
from trl_ext_plugins.trpa import TRPA, preference_pairs, unary_losses

NAN = math.nan


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


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
    rho = sequence_log_ratio(loss.per_token_logps, loss.batch["ref_per_token_logps"], loss.mask)
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


def preference_level(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [1 + sum(ids) % 4 for ids in completion_ids]


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
    "options", [{"beta": 0.0}, {"anisotropy": -1.0}, {"tr_kl_coef": -1.0}, {"levels": [{}]}, {"levels": [{"x": "y"}]}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(trl_ext.OptionError, match=next(iter(options))):
        trl_ext.enable("trpa", trpa=options)
