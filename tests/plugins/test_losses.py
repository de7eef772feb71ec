"""What the methods that work on the loss have in common: completions without a token, another sampler, restarts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl
from trl_ext_hooks.toolkit.losses import masked_mean

METHODS = [
    ("thinkless", "grpo"),
    ("p3o", "grpo"),
    ("p3o", "rloo"),
    ("trpa", "grpo"),
    ("reg-grpo", "grpo"),
    ("drpo", "grpo"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "thinkless": {"alpha": 0.3, "think": "T", "short": "S", "close": "E"},
    "p3o": {"reward_scale": "running_diff"},
    "trpa": {"tr_kl_coef": 1.0},
    "reg-grpo": {},
    "drpo": {"correct_threshold": 2.5},
}


def preference_level(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Levels for TRPA, and rewards that differ inside a group for the others; an empty completion is on level 1."""
    return [1.0 + sum(ids) % 4 for ids in completion_ids]


SGD = {"optim": "sgd", "learning_rate": 0.5, "beta": 0.0, "rewards": [preference_level]}


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Emptied(Plugin):
    """The second completion of every group has no token (as the first row of a round, TRL cannot pad it)."""

    name = "emptied"
    trainers = ("grpo", "rloo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.batches: list[Any] = []

    @hookimpl
    def rollout(self, prompts: Any, generate: Any) -> Any:
        result = generate(prompts)
        ids = [[] if row % 4 == 1 else [10 + (7 * row + t) % 80 for t in range(4)] for row in range(len(prompts))]
        return dataclasses.replace(result, completion_ids=ids)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.batches.append((loss.batch, loss.mask))


@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_completions_without_a_token(name: str, kind: str, build: Any, plugin: Any) -> None:
    """Every number stays finite and the rest of the group learns; only TRPA leaves such a row out of its pairs."""
    with trl_ext.enable(plugin(Emptied), name, **{name: OPTIONS[name]}):
        trainer = build(kind, max_steps=2, **SGD)
        before = [value.detach().clone() for value in trainer.model.parameters()]
        trainer.train()
        batches = trainer._trl_ext.plugins["emptied"].batches
    assert all(math.isfinite(value) for key in ("loss", "grad_norm") for value in logged(trainer, key))
    after = list(trainer.model.parameters())
    assert all(torch.isfinite(value).all() for value in after)
    assert max((new - old).abs().max() for new, old in zip(after, before, strict=True)) > 1e-4
    for batch, mask in batches:
        empty = mask.sum(1) == 0
        assert empty.sum() == 2
        if name == "thinkless":
            assert int(batch["thinkless_control"].sum()) == 6
        elif name == "p3o":
            assert not torch.isnan(batch["p3o_rewards"]).any()
        elif name == "reg-grpo":
            assert batch["reg_grpo_rows"].all()
        elif name == "drpo":
            assert batch["contrast_counted"].all()
        else:
            assert torch.equal(torch.isnan(batch["preference_level"]), empty)


class Sampler(Plugin):
    """What TRL adds to the batch where vLLM samples: a ratio per token."""

    name = "sampler"
    trainers = ("grpo",)
    fields = ("importance_sampling_ratio",)

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        return {"importance_sampling_ratio": (round.batch["completion_ids"] % 5) / 2.0}


class Direct(Plugin):
    """DeGRPO's token mean on-policy, written out with the ratio."""

    name = "direct"
    trainers = ("grpo",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        policy = torch.exp(loss.per_token_logps - loss.old_per_token_logps)
        losses = -loss.advantages * policy * loss.sampling_ratio
        control = torch.zeros_like(loss.mask)
        control[:, 0] = loss.mask[:, 0]
        alpha = OPTIONS["thinkless"]["alpha"]
        return PolicyLoss(alpha * masked_mean(losses, control) + masked_mean(losses, loss.mask * (1 - control)))


def test_the_sampler_s_ratio_weighs_both_means_of_thinkless(build: Any, plugin: Any) -> None:
    """The ratio is multiplied by TRL's own loss, on advantages that are weighed already."""
    sampler, common = plugin(Sampler), SGD | {"scale_rewards": "none", "max_steps": 3}
    with trl_ext.enable(sampler, plugin(Direct)):
        direct = build(**common)
        direct.train()
    found = {}
    for corrected in (True, False):
        with trl_ext.enable(sampler, "thinkless", thinkless=OPTIONS["thinkless"]):
            trainer = found[corrected] = build(**common)
            loss_of_trl = trainer._compute_loss

            def as_with_vllm(
                *args: Any, trainer: Any = trainer, compute: Any = loss_of_trl, on: bool = corrected
            ) -> Any:
                trainer.use_vllm = on  # for the loss only: nothing here can generate with vLLM
                loss = compute(*args)
                trainer.use_vllm = False
                return loss

            trainer._compute_loss = as_with_vllm
            trainer.train()
    assert logged(found[True], "loss") == pytest.approx(logged(direct, "loss"), abs=1e-5)
    pairs = list(zip(direct.model.parameters(), found[True].model.parameters(), strict=True))
    assert max((one - other).abs().max() for one, other in pairs) < 2e-5
    assert logged(found[False], "loss") != pytest.approx(logged(direct, "loss"), abs=1e-3)


def test_the_sampler_s_ratio_reaches_the_preferences_of_trpa(train: Any, plugin: Any) -> None:
    class Nothing(Sampler):
        @hookimpl
        def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
            return {"importance_sampling_ratio": 0 * round.loss_mask[:, :1].float()}

    with trl_ext.enable("trpa", plugin(Nothing)):
        trainer = train(max_steps=2, **SGD)
    assert logged(trainer, "grad_norm") == [0.0, 0.0] and logged(trainer, "trpa/pairs")[0] > 0


@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "kind"), METHODS)
def test_resuming_between_rounds_of_several_updates_is_bit_exact(
    name: str, kind: str, adapters: bool, build: Any
) -> None:
    """The reference stays the policy that the run began with, not the one of the checkpoint."""
    from peft import LoraConfig

    settings = SGD | {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    if adapters:
        settings["trainer"] = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
        settings["learning_rate"] = 5.0

    def make() -> Any:
        torch.manual_seed(0)  # before 1.16, TRL makes adapters from the random state that it finds
        return build(kind, **settings)

    with trl_ext.enable(name, **{name: OPTIONS[name]}):
        whole = make()
        whole.train()
        resumed = make()
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    for (label, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), label
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:] and len(set(logged(whole, "loss"))) > 2
