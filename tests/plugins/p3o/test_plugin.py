"""P3O: the loss of a micro-batch, rows that can be in no pair, and settings that are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext.testing import tiny_args
from trl_ext_hooks import Loss
from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_plugins.p3o import P3O

NAN = math.nan
VARIANTS = ("v1", "v2", "v2_token")


def micro_batch(rewards: list[float], groups: list[int], seed: int = 0, drift: float = 0.0, **batch: Any) -> Loss:
    """Four tokens per row, with a reference that is 0.1 nats a token below the sampling policy."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand((len(rewards), 4), generator=generator, dtype=torch.float64)
    logps = (old + drift * torch.randn(old.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    values = torch.tensor(rewards, dtype=torch.float64)
    ids = torch.tensor(groups)
    fields = {
        "completion_mask": torch.ones(old.shape, dtype=torch.long),
        "old_per_token_logps": old,
        "ref_per_token_logps": old - 0.1,
        "p3o_rewards": values,
        "trl_ext_group_ids": ids,
        "p3o_total": torch.tensor(float(len(group_pairs(ids, ~torch.isnan(values))))),
    }
    return Loss("train", 0, None, fields | batch, logps, None)


def gradient(loss: Loss, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    plugin = P3O(P3O.Options(**options))
    value = plugin.policy_loss(loss=loss).values
    return value.detach(), torch.autograd.grad(value, loss.per_token_logps)[0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=5), st.sampled_from(["v1", "v2"]))
def test_all_pairs_on_policy_are_rloo(rewards: list[float], variant: str) -> None:
    """Odd groups too: dL/dS_i = -A_i / N with A_i = (G / (G - 1)) * (r_i - mean)."""
    size = len(rewards)
    values = [*rewards, *(-value for value in rewards)]
    _, found = gradient(micro_batch(values, [0] * size + [7] * size), variant=variant, kl_coef=0.0)
    grouped = torch.tensor(values, dtype=torch.float64).view(2, size)
    advantages = size / (size - 1) * (grouped - grouped.mean(1, keepdim=True))
    torch.testing.assert_close(found, (-advantages / (2 * size)).reshape(-1, 1).expand(-1, 4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_rewards_without_kl_give_nothing(variant: str) -> None:
    _, found = gradient(micro_batch([0.3] * 4, [0] * 4, drift=0.5), variant=variant, kl_coef=0.0)
    assert (found == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_empty_completion_still_moves_its_partner(variant: str) -> None:
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]])
    total = torch.tensor(3.0 if variant == "v2_token" else 1.0)
    value, found = gradient(
        micro_batch([1.0, 0.0], [0, 0], completion_mask=mask, p3o_total=total), variant=variant, kl_coef=0.0
    )
    assert math.isfinite(value) and (found[0] == 0).all() and (found[1, :3] > 0).all() and found[1, 3] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_results_of_tools_do_not_count(variant: str) -> None:
    rewards, tools = [1.0, 0.0], torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    value, found = gradient(micro_batch(rewards, [0, 0], drift=0.3, tool_mask=tools), variant=variant)
    expected = gradient(micro_batch(rewards, [0, 0], drift=0.3, completion_mask=tools), variant=variant)
    torch.testing.assert_close((value, found), expected)
    assert (found[tools == 0] == 0).all() and (found[tools == 1] != 0).any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_a_reward_are_in_no_pair(variant: str) -> None:
    loss = micro_batch([1.0, NAN, 0.0, 0.5], [0] * 4, drift=0.3)
    value, found = gradient(loss, variant=variant)
    assert math.isfinite(value) and (found[1] == 0).all() and (found[[0, 2]] != 0).any()
    rows = [0, 2, 3]
    fewer = {name: field[rows] if field.dim() else field for name, field in loss.batch.items()}
    same = Loss("train", 0, None, fewer, loss.per_token_logps.detach()[rows].requires_grad_(), None)
    expected, alone = gradient(same, variant=variant)
    torch.testing.assert_close((value, found[rows]), (expected, alone))


@pytest.mark.parametrize("groups", [[0, 1], [0, 0]])
def test_a_micro_batch_without_pairs_is_a_differentiable_nothing(groups: list[int]) -> None:
    loss = micro_batch([1.0, 0.0] if groups == [0, 1] else [NAN, NAN], groups)
    assert gradient(loss)[0] == 0 and (gradient(loss)[1] == 0).all()


def test_kl_of_the_current_or_of_the_sampling_policy() -> None:
    """Both agree on-policy, and not after a drift."""
    still, drifted = micro_batch([1.0, 0.0], [0, 0]), micro_batch([1.0, 0.0], [0, 0], drift=0.3)
    for loss, alike in ((still, True), (drifted, False)):
        (_, current), (_, rollout) = (gradient(loss, kl_coef=0.2, kl_source=s) for s in ("current", "rollout"))
        assert torch.allclose(current, rollout) == alike
    longer = micro_batch([0.0, 0.0], [0, 0], completion_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    _, found = gradient(longer, kl_coef=0.2)
    # S1 - S2 = 0.2, so q = -0.04 and the row with the larger KL goes down
    torch.testing.assert_close(found, torch.tensor([[0.02] * 4, [-0.02, -0.02, 0, 0]], dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ratio_to_another_sampler_weighs_the_gradient_of_its_row_or_token(variant: str) -> None:
    for ratio in (torch.tensor([[0.0], [1.0], [2.5], [1.0]]), torch.linspace(0, 3, 16).view(4, 4)):
        plain = micro_batch([1.0, 0.0, 0.4, 0.1], [0] * 4, drift=0.2)
        value, found = gradient(plain, variant=variant)
        corrected = micro_batch([1.0, 0.0, 0.4, 0.1], [0] * 4, drift=0.2, importance_sampling_ratio=ratio)
        same, weighed = gradient(corrected, variant=variant)
        torch.testing.assert_close((same, weighed), (value, found * ratio))


@pytest.mark.parametrize(
    ("kind", "settings_", "expected"),
    [
        ("rloo", {}, "p3o replaces the policy loss and does not apply beta=0.05; set beta=0.0"),
        ("grpo", {"epsilon": 0.3}, "p3o replaces the policy loss and does not apply epsilon=0.3; set epsilon=0.2"),
        ("grpo", {"loss_type": "grpo"}, "does not apply loss_type='grpo'; set loss_type='dapo'"),
        ("grpo", {"scale_rewards": "batch"}, "does not apply scale_rewards='batch'; set scale_rewards='group'"),
        ("grpo", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, "num_generations=4; use 4"),
    ],
)
def test_what_it_does_not_apply_is_refused(kind: str, settings_: dict[str, Any], expected: str, build: Any) -> None:
    from trl import GRPOTrainer, RLOOTrainer

    cls = {"grpo": GRPOTrainer, "rloo": RLOOTrainer}[kind]
    with trl_ext.enable("p3o"), pytest.raises(trl_ext.ConfigError) as caught:
        build(kind, cls=lambda **given_: cls(**given_ | {"model": "/no/such/model"}), **settings_)
    assert expected in str(caught.value)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_trl_itself_wants_two_completions(kind: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        tiny_args(kind, tmp_path, num_generations=1)


@pytest.mark.parametrize(
    "options", [{"cliprange": -0.1}, {"cliprange_ratio": 0.5}, {"kl_coef": -1.0}, {"reward_clip": 0.0}]
)
def test_impossible_options(options: dict[str, float]) -> None:
    with pytest.raises(trl_ext.OptionError, match=next(iter(options))):
        trl_ext.enable("p3o", p3o=options)
