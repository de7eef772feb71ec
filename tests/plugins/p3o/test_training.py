"""P3O: real runs against RLOO, and what must not change a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import digits, tiny_data
from trl_ext_hooks import Plugin, hookimpl

VARIANTS = ("v1", "v2", "v2_token")


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


def moved(trainer: Any, build: Any, kind: str) -> float:
    fresh = dict(build(kind, beta=0.0).model.named_parameters())
    return max((value - fresh[name]).abs().max().item() for name, value in trainer.model.named_parameters())


def constant(*values: float) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in values)


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


@pytest.mark.parametrize("kind", ["grpo", pytest.param("rloo", marks=pytest.mark.slow)])
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
