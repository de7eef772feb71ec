"""Settings of TRL that a replaced loss would drop."""

from __future__ import annotations

from typing import Any

import pytest

import trl_ext
from tests.refusals import refused, unloadable
from tests.sample_plugins import OwnLoss
from trl_ext import ConfigError
from trl_ext.catalog.find import resolve
from trl_ext.plan.check import make_plan
from trl_ext_hooks import (
    Config,
)

DROPPED = [
    ("beta", 0.1),
    ("top_entropy_quantile", 0.5),
    ("off_policy_mask_threshold", 0.5),
    ("entropy_coef", 0.01),
    ("use_adaptive_entropy", True),
    ("delta", 2.0),
    ("importance_sampling_level", "sequence"),
    ("loss_type", "grpo"),
    ("epsilon", 0.3),
    ("epsilon_high", 0.28),
]


@pytest.mark.parametrize(("setting", "value"), DROPPED)
def test_settings_that_a_replaced_loss_would_drop(setting: str, value: Any, build: Any, plugin: Any) -> None:
    from trl import GRPOConfig

    if not hasattr(GRPOConfig(use_cpu=True, bf16=False), setting):
        pytest.skip("this TRL has no such setting")
    expected = f"own-loss replaces the policy loss and does not apply {setting}={value!r}; set {setting}="
    with trl_ext.enable(plugin(OwnLoss)), refused(ConfigError, expected):
        build(cls=unloadable("grpo"), **{setting: value})

    class Honest(OwnLoss):
        name = "honest"
        honours = (setting,)

    with trl_ext.enable(plugin(Honest)):
        assert build(**{setting: value}) is not None


def test_rlos_kl_term_is_no_part_of_the_loss(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(OwnLoss)):
        build("rloo", beta=0.1, max_steps=1).train()


def test_the_correction_for_vllm_is_dropped_only_where_there_is_one(build: Any, plugin: Any) -> None:
    expected = "does not apply vllm_importance_sampling_correction=True; set vllm_importance_sampling_correction=False"
    with trl_ext.enable(plugin(OwnLoss)):
        with refused(ConfigError, expected):
            build(cls=unloadable("grpo"), use_vllm=True)
        for kind, settings in (("grpo", {"vllm_importance_sampling_correction": False}), ("rloo", {})):
            with pytest.raises(Exception, match=r"no/such/model|vllm"):  # what TRL itself says next
                build(kind, cls=unloadable(kind), use_vllm=True, **settings)


def test_a_subclass_of_the_arguments_may_have_other_defaults(plugin: Any) -> None:
    """The user asked for these values by choosing the class."""
    from dataclasses import dataclass

    from trl import GRPOConfig

    @dataclass
    class Mine(GRPOConfig):
        epsilon: float = 0.4

    config = Config("grpo", Mine(use_cpu=True, bf16=False, num_generations=4), ("digits",), ("prompt",), ())
    with refused(ConfigError, "does not apply epsilon=0.4; set epsilon=0.2"):
        make_plan(resolve({plugin(OwnLoss): None}), config)


class WithoutAdvantages(OwnLoss):
    name = "without-advantages"
    claims = ("no_advantages",)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("grpo", "scale_rewards", "batch"),
        ("grpo", "multi_objective_aggregation", "normalize_then_sum"),
        ("rloo", "beta", 0.05),
        ("rloo", "normalize_advantages", True),
        ("rloo", "reward_clip_range", (-1.0, 1.0)),
    ],
)
def test_settings_of_advantages_that_a_loss_leaves_unused(
    kind: str, setting: str, value: Any, build: Any, plugin: Any
) -> None:
    expected = f"without-advantages replaces the policy loss and does not apply {setting}={value!r}; set {setting}="
    with trl_ext.enable(plugin(WithoutAdvantages)):
        with refused(ConfigError, expected):
            build(kind, cls=unloadable(kind), **{setting: value})
        build("grpo", scale_rewards="none")
    settings = {"beta": 0.0} | ({} if kind == "grpo" else {setting: value})
    with trl_ext.enable(plugin(OwnLoss)):
        build(kind, **settings if setting != "beta" else {"beta": value})
