"""P3O: its mathematics against loops, rows that can be in no pair, and real runs against RLOO."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trl_ext
from trl_ext.testing import digits, tiny_args, tiny_data
from trl_ext_hooks import Loss, Plugin, hookimpl
from trl_ext_hooks.toolkit.groups import group_pairs
from trl_ext_plugins.p3o import (
    P3O,
    add_to_moments,
    joint_clipping,
    reward_gap,
    running_std,
    separate_clipping,
    token_clipping,
)

NAN = math.nan
SEEDS = st.integers(0, 10_000)
VARIANTS = ("v1", "v2", "v2_token")
CLIP = (0.2, 10.0)


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def moved(trainer: Any, build: Any, kind: str) -> float:
    fresh = dict(build(kind, beta=0.0).model.named_parameters())
    return max((value - fresh[name]).abs().max().item() for name, value in trainer.model.named_parameters())


def sides(seed: int, pairs: int = 5, drift: float = 0.4) -> dict[str, Any]:
    """Scores, old scores and rewards of some pairs; the first two carry gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(pairs, generator=generator, dtype=torch.float64)

    old = (draw(), draw())
    scores = tuple((value + draw(drift)).requires_grad_() for value in old)
    return {"scores": scores, "old": old, "rewards": (draw(), draw())}


def pair_loss(
    variant: str, scores: Any, old: Any, rewards: Any, kl: float = 0.05, clip: tuple[float, float] = CLIP
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(mean loss, gradients of both sides)"""
    gap = reward_gap(rewards, scores, kl)
    ratios = (scores[0] - old[0], scores[1] - old[1])
    if variant == "v1":
        values, _ = separate_clipping(ratios, gap, *clip)
    else:
        values, _ = joint_clipping(ratios, old, gap, *clip)
    loss = values.mean()
    return loss.detach(), list(torch.autograd.grad(loss, scores))


# --- the mathematics --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from(["v1", "v2"]), st.floats(0.05, 0.5), st.floats(1.0, 5.0))
def test_it_is_the_loop_of_the_equations(seed: int, variant: str, eps: float, c: float) -> None:
    given_ = sides(seed)
    total = 0.0
    for k in range(5):
        s1, s2, o1, o2, r1, r2 = (
            given_[name][side][k].item() for name in ("scores", "old", "rewards") for side in (0, 1)
        )
        q = r1 - r2 - 0.05 * (s1 - s2)

        def cl(x: float) -> float:
            return min(max(x, 1 / c), c)

        w1, w2 = math.exp(s1 - o1), math.exp(s2 - o2)
        if variant == "v1":
            a = (-q * cl(w2) * w1, -q * cl(w2) * min(max(w1, 1 - eps), 1 + eps))
            b = (q * cl(w1) * w2, q * cl(w1) * min(max(w2, 1 - eps), 1 + eps))
            total += (max(a) + max(b)) / 2
        else:
            u, d, d0 = cl(w1 * w2), s1 - s2, o1 - o2
            total += max(-q * u * d, -q * u * min(max(d, d0 - eps), d0 + eps)) / 2
    loss, _ = pair_loss(variant, **given_, clip=(eps, c))
    assert loss.item() == pytest.approx(total / 5, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(["v1", "v2"]), st.floats(0.1, 10))
def test_a_constant_per_prompt_does_not_matter_and_a_factor_is_a_factor(seed: int, variant: str, k: float) -> None:
    found = sides(seed)
    loss, gradients = pair_loss(variant, **found)
    shift = 10 * torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shifted = found | {"rewards": tuple(reward + shift for reward in found["rewards"])}
    same, alike = pair_loss(variant, **shifted)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(alike, gradients)
    scaled = found | {"rewards": tuple(reward * k for reward in found["rewards"])}
    _, larger = pair_loss(variant, **scaled, kl=0.05 * k)
    torch.testing.assert_close(larger, [gradient * k for gradient in gradients])


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_exchanging_the_completions_exchanges_the_gradients(variant: str) -> None:
    found = sides(1)
    loss, (one, two) = pair_loss(variant, **found)
    exchanged = {name: (second, first) for name, (first, second) in found.items()}
    same, (other, first) = pair_loss(variant, **exchanged)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close((first, other), (one, two))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["v1", "v2"]), st.sampled_from([0.0, 0.2]))
def test_on_policy_it_is_the_pairwise_policy_gradient(seed: int, variant: str, eps: float) -> None:
    """Also with a clip range of 0, where both branches tie and both pass the gradient."""
    found = sides(seed, drift=0.0)
    gap = reward_gap(found["rewards"], found["scores"], 0.05)
    loss, (one, two) = pair_loss(variant, **found, clip=(eps, 10.0))
    torch.testing.assert_close(one, -gap / 10)  # -q / (2 P)
    torch.testing.assert_close(two, gap / 10)
    difference = found["scores"][0].detach() - found["scores"][1].detach()
    expected = torch.zeros(()) if variant == "v1" else -(gap * difference).mean() / 2
    torch.testing.assert_close(loss, expected.double())


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_without_clipping_both_variants_have_one_gradient(seed: int) -> None:
    found = sides(seed, drift=0.1)
    wide = (1e6, 1e6)
    _, one = pair_loss("v1", **found, clip=wide)
    _, two = pair_loss("v2", **found, clip=wide)
    torch.testing.assert_close(one, two)
    ratio = sum(new.detach() - old for new, old in zip(found["scores"], found["old"], strict=True)).exp()
    torch.testing.assert_close(one[0], -reward_gap(found["rewards"], found["scores"], 0.05) * ratio / 10)


def constant(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values)


def test_clipping_stops_the_gradient_on_the_side_that_profits() -> None:
    old, better, worse = constant(0.0, 0.0), constant(1.0, 0.0), constant(0.0, 1.0)
    for drift, rewards, stopped in (
        (0.5, better, True),
        (0.5, worse, False),
        (-0.5, worse, True),
        (-0.5, better, False),
    ):
        _, gradients = pair_loss("v2", constant(drift, 0.0), old, rewards, kl=0.0)
        assert (gradients[0] == 0).item() == (gradients[1] == 0).item() == stopped
        _, (own, _) = pair_loss("v1", constant(drift, 0.0), old, rewards, kl=0.0)
        assert (own == 0).item() == stopped


def test_what_is_detached_has_no_gradient() -> None:
    """At w = 1 and inside the clip range the loss is linear in the scores, so a gradient through q or cl would show."""
    found = sides(3, drift=0.05)
    for variant in ("v1", "v2"):
        _, free = pair_loss(variant, **found, kl=0.3, clip=(10.0, 1.0))  # c = 1: importance weights are constant
        gap = reward_gap(found["rewards"], found["scores"], 0.3)
        ratios = [(new - old).detach().exp() for new, old in zip(found["scores"], found["old"], strict=True)]
        own = ratios if variant == "v1" else [torch.ones(5)] * 2
        torch.testing.assert_close(free, [-gap * own[0] / 10, gap * own[1] / 10])
    assert not reward_gap(found["rewards"], found["scores"], 0.3).requires_grad


def test_a_ratio_that_explodes_against_the_reward() -> None:
    """V1 keeps the unclipped ratio, as the authors' code does; V2 is bounded."""
    old, rewards = constant(0.0, 0.0), constant(0.0, 1.0)
    loss, _ = pair_loss("v1", constant(9.0, 0.0), old, rewards, kl=0.0)
    assert loss.item() == pytest.approx((math.exp(9.0) - 10.0) / 2)
    loss, _ = pair_loss("v2", constant(9.0, 0.0), old, rewards, kl=0.0)
    assert loss.item() == pytest.approx(10 * 9.0 / 2)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_the_token_wise_form_is_its_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 4)
    old = tuple(-torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    new = tuple(value + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for value in old)
    masks = (torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]), torch.tensor([[1, 1, 0, 0]] * 3))
    gap = torch.randn(3, generator=generator, dtype=torch.float64)
    values, clipped = token_clipping(new, old, masks, gap, *CLIP)
    for p in range(3):
        drift = sum(((new[s][p] - old[s][p]) * masks[s][p]).sum().item() for s in (0, 1))
        u, total, count = min(max(math.exp(drift), 0.1), 10.0), 0.0, 0
        for side, t in itertools.product((0, 1), range(4)):
            if masks[side][p, t]:
                factor = (-1 if side == 0 else 1) * gap[p].item() * u
                lp, before = new[side][p, t].item(), old[side][p, t].item()
                bound = min(max(lp, before - 0.2), before + 0.2)
                total += max(factor * lp, factor * bound)
                count += factor * bound > factor * lp
        assert values[p].item() == pytest.approx(total, abs=1e-9) and clipped[p].item() == count


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_everything_seen(batches: list[list[float]]) -> None:
    moments = (0.0, 0.0, 0.0)
    for batch in batches:
        moments = add_to_moments(moments, torch.tensor(batch))
    everything = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    expected = max(everything.std().item(), 1e-4) if len(everything) > 1 else 1.0
    assert running_std(moments) == pytest.approx(expected, abs=1e-5)


# --- the loss of a micro-batch ----------------------------------------------------------------------------------------


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


# --- real runs --------------------------------------------------------------------------------------------------------


def ragged(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) / 3 - len(ids) / 10 for ids in completion_ids]


def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 7) / 3 for ids in completion_ids]


SGD = {"optim": "sgd", "learning_rate": 0.05, "rewards": [digits, ragged]}


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_on_policy_without_kl_a_run_is_an_rloo_run(variant: str, train: Any, build: Any) -> None:
    common = SGD | {"beta": 0.0, "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    stock = train("rloo", **common)
    found = {}
    for kind in ("rloo", "grpo"):
        with trl_ext.enable("p3o", p3o={"variant": variant, "kl_coef": 0.0}):
            found[kind] = train(kind, **common)
        assert_close_training(stock, found[kind], 2e-6)
        assert logged(found[kind], "grad_norm") == pytest.approx(logged(stock, "grad_norm"), rel=1e-4)
        assert logged(found[kind], "p3o/pairs") == [6.0] * 3 and not logged(found[kind], "p3o/kl")
    assert moved(stock, build, "rloo") > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_first_variant_with_constant_importance_is_rloo_off_policy_too(beta: float, train: Any, build: Any) -> None:
    """Groups of two, importance weights of 1, KL of the rollout: TRL's RLOO with clipping and its reference model."""
    common = SGD | {"num_generations": 2, "num_iterations": 3, "max_steps": 6, "learning_rate": 0.5}
    common |= {"per_device_train_batch_size": 8}
    stock = train("rloo", beta=beta, **common)
    options = {"variant": "v1", "cliprange_ratio": 1.0, "kl_coef": beta, "kl_source": "rollout"}
    with trl_ext.enable("p3o", p3o=options):
        ours = train("rloo", beta=0.0, **common)
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), abs=2e-5)
    assert_close_training(stock, ours, 2e-5)
    assert max(logged(ours, "p3o/clipped")) > 0 and max(logged(ours, "p3o/log_ratio_max")) > 0.2
    assert moved(stock, build, "rloo") > 1e-2


class Tools(Plugin):
    """Calls every third token the result of a tool."""

    name = "tools"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        result = generate(prompts)
        mask = [[int(t % 3 != 1) for t in range(len(ids))] for ids in result.completion_ids]
        return dataclasses.replace(result, tool_mask=mask)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulation_trains_alike(kind: str, variant: str, train: Any, build: Any, plugin: Any) -> None:
    """Also where micro-batches hold different numbers of pairs and tokens, as some rewards and tokens do not count."""
    common = SGD | {"rewards": [sometimes], "beta": 0.0, "max_steps": 4, "num_iterations": 2}
    with trl_ext.enable("p3o", *([plugin(Tools)] if kind == "grpo" else []), p3o={"variant": variant}):
        whole = train(kind, per_device_train_batch_size=16, **common)
        split = train(kind, per_device_train_batch_size=4, gradient_accumulation_steps=4, **common)
    assert len(set(logged(split, "p3o/pairs"))) > 1
    assert_close_training(whole, split, 5e-6)
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    assert moved(whole, build, kind) > 1e-3


def test_a_constant_per_prompt_changes_nothing_in_a_run(train: Any) -> None:
    def shifted(completion_ids: list[list[int]], index: list[int], **kwargs: Any) -> list[float]:
        constants = [(37 * i) % 11 - 5.0 for i in index]  # exact in float32, and below the clipping of rewards
        return [value + constant for value, constant in zip(eighths(completion_ids), constants, strict=True)]

    def eighths(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [float(sum(ids) % 7) / 8 for ids in completion_ids]

    common = {"max_steps": 4, "num_iterations": 2, "learning_rate": 0.02, "max_completion_length": 6}
    for scale in ("none", "running_diff"):
        with trl_ext.enable("p3o", p3o={"reward_scale": scale}):
            plain, moved_ = train(rewards=[eighths], **common), train(rewards=[shifted], **common)
        for one, other in zip(plain.model.parameters(), moved_.model.parameters(), strict=True):
            assert torch.equal(one, other)
    with trl_ext.enable("p3o", p3o={"reward_scale": "running"}):  # as the authors scale, it does matter
        plain, moved_ = train(rewards=[eighths], **common), train(rewards=[shifted], **common)
    assert any(not torch.equal(a, b) for a, b in zip(plain.model.parameters(), moved_.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_masked_truncated_completions_are_in_no_pair(kind: str, train: Any, plugin: Any) -> None:
    class Look(Plugin):
        name = "look"
        trainers = ("grpo", "rloo")

        @hookimpl
        def loss_metrics(self, loss: Any) -> dict[str, Any]:
            masked = loss.mask.sum(1) == 0
            assert torch.equal(masked, torch.isnan(loss.batch["p3o_rewards"]))
            return {"masked": (masked.sum().item(), len(masked))}

    with trl_ext.enable("p3o", plugin(Look)):
        trainer = train(kind, beta=0.0, mask_truncated_completions=True, max_steps=4, max_completion_length=48)
    assert 0 < sum(logged(trainer, "look/masked")) < 4
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_a_round_without_any_pair(train: Any) -> None:
    """Nothing ends within 2 tokens, so every row is masked, the loss is 0 and nothing moves."""
    with trl_ext.enable("p3o"):
        trainer = train(mask_truncated_completions=True, max_completion_length=2, max_steps=1)
    assert logged(trainer, "p3o/pairs") == [0.0] and logged(trainer, "grad_norm") == [0.0]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_adapters_and_shared_prefixes(kind: str, train: Any, build: Any) -> None:
    from peft import LoraConfig

    common = SGD | {"beta": 0.0, "max_steps": 3, "num_iterations": 3, "learning_rate": 0.5}
    common["trainer"] = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
    torch.manual_seed(0)  # before 1.16, TRL makes adapters from the random state that it finds
    with trl_ext.enable("p3o"):
        dense = train(kind, **common)
    torch.manual_seed(0)
    with trl_ext.enable("p3o", "shared-prefix"):
        packed = train(kind, **common)
    assert logged(dense, "p3o/kl")[0] == pytest.approx(0, abs=1e-5) and abs(logged(dense, "p3o/kl")[-1]) > 1e-4
    assert min(logged(packed, "shared-prefix/token_ratio")) > 1.1
    assert_close_training(dense, packed, 2e-5)


def test_evaluation_uses_its_own_groups(build: Any) -> None:
    with trl_ext.enable("p3o"):
        data = tiny_data().select([0, 1])
        trainer = build(
            trainer={"eval_dataset": data}, num_generations_eval=2, max_steps=1, per_device_eval_batch_size=4
        )
        trainer.train()
        trainer.evaluate()
        assert logged(trainer, "eval_p3o/pairs") == [2.0] and math.isfinite(logged(trainer, "eval_loss")[0])
        alone = build(trainer={"eval_dataset": data}, num_generations_eval=1, max_steps=1, per_device_eval_batch_size=2)
        alone.train()
        alone.evaluate()
    assert logged(alone, "eval_loss") == [0.0] and logged(alone, "eval_p3o/pairs") == [0.0]


@pytest.mark.parametrize("scale", ["running", "running_diff"])
def test_running_moments_survive_a_restart(scale: str, build: Any) -> None:
    common = {"max_steps": 3, "rewards": [ragged], "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}
    with trl_ext.enable("p3o", p3o={"reward_scale": scale}):
        whole = build(**common)
        whole.train()
        resumed = build(**common)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-1")
        one, other = (trainer._trl_ext.plugins["p3o"].moments for trainer in (whole, resumed))
    assert one == other and one[0] == (24 if scale == "running" else 72)
    for name, value in whole.model.named_parameters():
        assert torch.equal(dict(resumed.model.named_parameters())[name], value)


def test_the_sampler_s_ratio_in_a_real_run(train: Any, plugin: Any) -> None:
    class Sampler(Plugin):
        """What TRL adds to the batch when vLLM samples."""

        name = "sampler"
        trainers = ("grpo",)
        fields = ("importance_sampling_ratio",)

        @hookimpl
        def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
            return {"importance_sampling_ratio": 0 * round.loss_mask[:, :1].float()}

    with trl_ext.enable("p3o", plugin(Sampler)):
        trainer = train(max_steps=2, num_iterations=2)
    assert logged(trainer, "grad_norm") == [0.0, 0.0] and logged(trainer, "p3o/reward_gap")[0] > 0


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
