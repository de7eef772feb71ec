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
from trl_ext_hooks import Config, Plugin, Recommend, Require, hookimpl
from trl_ext_hooks.toolkit.groups import group_normalize

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


class Estimates(Plugin):
    """An estimator that knows no setting of TRL's advantages."""

    name = "estimates"
    trainers = ("grpo", "rloo")
    claims = ("estimator",)

    @hookimpl
    def advantages(self, round: Any) -> Any:
        return group_normalize(round.total_reward, round.group_ids, scale=False).nan_to_num(nan=0.0)


IGNORED = [
    ("grpo", "scale_rewards", "none", "group"),
    ("grpo", "scale_rewards", "batch", "group"),
    ("grpo", "multi_objective_aggregation", "normalize_then_sum", "sum_then_normalize"),
    ("rloo", "beta", 0.1, 0.0),
    ("rloo", "normalize_advantages", True, False),
    ("rloo", "reward_clip_range", (-1.0, 1.0), None),
]


@pytest.mark.parametrize(("kind", "setting", "value", "neutral"), IGNORED)
def test_settings_of_advantages_that_an_estimator_would_ignore(
    kind: str, setting: str, value: Any, neutral: Any, build: Any, plugin: Any
) -> None:
    class Applies(Estimates):
        name = "applies"
        honours = (setting,)

    class Speaks(Estimates):
        name = "speaks"

        @hookimpl
        def configure(self, config: Any) -> Any:
            yield Require(setting, (value,), why="that is what it does")

    with trl_ext.enable(plugin(Estimates)):
        with refused(ConfigError, "estimates computes the advantages itself", f"{setting}={value!r}; set {setting}="):
            build(kind, cls=unloadable(kind), **{setting: value})
        build(kind, **{setting: neutral})  # the advice works
    for cls in (Applies, Speaks):
        with trl_ext.enable(plugin(cls)):
            build(kind, **{setting: value})


@pytest.mark.parametrize("name", ["gdpo", "decs", "spae", "hdpo", "vl-dac"])
@pytest.mark.parametrize("value", ["none", "batch"])
def test_built_in_estimators_ignore_no_scaling_of_rewards(name: str, value: str, build: Any) -> None:
    with trl_ext.enable(name), refused(ConfigError, name, "scale_rewards="):
        build(cls=unloadable("grpo"), scale_rewards=value, per_device_train_batch_size=8)


def test_a_default_that_an_estimator_ignores_is_said(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Estimates)):
        assert build()._trl_ext.plan.notes == ()
        (note,) = build("rloo")._trl_ext.plan.notes
        assert build("rloo", beta=0.0)._trl_ext.plan.notes == ()
        build(beta=0.1)  # GRPO adds the KL term to its loss
    assert "does not apply the KL term of RLOO's rewards, beta=0.05" in note


def test_nothing_is_recommended_that_has_no_effect(build: Any, plugin: Any) -> None:
    class Advises(Plugin):
        name = "advises"
        trainers = ("grpo",)

        @hookimpl
        def configure(self, config: Any) -> Any:
            yield Recommend("scale_rewards", "none", "paper")

        @hookimpl
        def round_metrics(self, round: Any) -> None: ...

    with trl_ext.enable(plugin(Advises)):
        assert len(build()._trl_ext.plan.notes) == 1
    with trl_ext.enable(plugin(Advises), plugin(Estimates)):
        assert build()._trl_ext.plan.notes == ()
