"""A replaced policy loss in real trainers: averages, a router's loss, extra terms beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, PolicyLoss, hookimpl

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_close_training(one: Any, other: Any, limit: float) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        torch.testing.assert_close(others[name], value, atol=limit, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


class One(Plugin):
    name = "one"
    trainers = ROUNDS

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        return {"constant": torch.tensor(1.0), "half": torch.tensor(0.5)}


def clipped(loss: Any) -> torch.Tensor:
    """(m, T) the stock surrogate with clipping to 0.2."""
    ratio = torch.exp(loss.per_token_logps - loss.old_per_token_logps)
    return -torch.min(ratio * loss.advantages, ratio.clamp(0.8, 1.2) * loss.advantages)


class Clipped(Plugin):
    name = "clipped"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(clipped(loss))


class TokenMean(Plugin):
    name = "token-mean"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(clipped(loss), "token_mean")


class SequenceMean(Plugin):
    name = "sequence-mean"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(clipped(loss), "sequence_mean")


class Scalar(Plugin):
    name = "scalar"
    trainers = ("grpo",)
    honours = ("loss_type",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        return PolicyLoss(((clipped(loss) * loss.mask).sum(1) / loss.mask.sum(1)).mean())


REPLACED = [(Clipped, name) for name in ("dapo", "grpo", "bnpo", "dr_grpo")]
REPLACED += [(TokenMean, "bnpo"), (SequenceMean, "grpo"), (Scalar, "grpo")]


@pytest.mark.parametrize(("cls", "loss_type"), REPLACED)
def test_the_stock_loss_as_a_plugin_trains_as_the_stock_loss(
    cls: type[Plugin], loss_type: str, build: Any, plugin: Any
) -> None:
    settings = {"loss_type": loss_type, "num_iterations": 2, "max_steps": 4, "learning_rate": 0.05}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    settings |= {"trainer": {"eval_dataset": tiny_data().select([0, 1])}}
    plain = build(**settings)
    plain.train()
    plain.evaluate()
    with trl_ext.enable(plugin(cls)):
        trainer = build(**settings)
        trainer.train()
        trainer.evaluate()
    assert_close_training(plain, trainer, 1e-5)
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    assert logged(trainer, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), abs=1e-6)
    assert logged(trainer, "entropy") == logged(plain, "entropy")
    # clip ratios of a loss that was not used would mislead
    assert logged(plain, "clip_ratio/region_mean") and not logged(trainer, "clip_ratio/region_mean")


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_replaced_loss_keeps_the_auxiliary_loss_of_a_router(
    kind: str, model: str, build: Any, plugin: Any, tmp_path: Any
) -> None:
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=2, **shape, **ids)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    cls = getattr(__import__("trl"), f"{kind.upper()}Trainer")
    settings = {"cls": lambda **given: cls(**given | {"model": str(tmp_path / "moe")}), "max_steps": 2, "beta": 0.0}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.01}
    settings |= {"router_aux_loss_coef": 5.0}
    plain = build(kind, **settings)
    plain.train()
    with trl_ext.enable(plugin({"grpo": Clipped, "rloo": SequenceRatio}[kind])):
        trainer = build(kind, **settings)
        trainer.train()
    assert logged(plain, "aux_loss") and logged(trainer, "aux_loss") == pytest.approx(
        logged(plain, "aux_loss"), abs=1e-5
    )
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-4) and logged(plain, "loss")[0] > 5
    assert_close_training(plain, trainer, 1e-4)


class SequenceRatio(Plugin):
    """RLOO's own loss."""

    name = "sequence-ratio"
    trainers = ("rloo",)

    @hookimpl
    def policy_loss(self, loss: Any) -> PolicyLoss:
        difference = (loss.per_token_logps - loss.old_per_token_logps) * loss.mask
        ratio, advantages = torch.exp(difference.sum(1)), loss.advantages.squeeze(1)
        return PolicyLoss(-torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean())


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloos_own_loss_as_a_plugin_trains_as_rloo(beta: float, build: Any, plugin: Any) -> None:
    """Its KL term is part of the rewards, so a replaced loss keeps it."""
    settings = {"num_iterations": 2, "max_steps": 4, "gradient_accumulation_steps": 2, "beta": beta}
    settings |= {"per_device_train_batch_size": 4}
    plain = build("rloo", **settings)
    plain.train()
    with trl_ext.enable(plugin(SequenceRatio)):
        trainer = build("rloo", **settings)
        trainer.train()
    assert_close_training(plain, trainer, 1e-5)
    assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)


def test_a_token_loss_of_rloo_adds_up_rows(build: Any, plugin: Any) -> None:
    class Reinforce(Plugin):
        name = "reinforce"
        trainers = ("rloo",)

        @hookimpl
        def policy_loss(self, loss: Any) -> PolicyLoss:
            values = -loss.advantages * loss.per_token_logps
            self.expected = (values * loss.mask).sum(1).mean().item()
            return PolicyLoss(values)

    with trl_ext.enable(plugin(Reinforce)):
        trainer = build("rloo", max_steps=1)
        trainer.train()
        expected = own(trainer, "reinforce").expected
    assert logged(trainer, "loss") == [pytest.approx(expected, abs=1e-6)]


def test_a_replaced_loss_and_extra_terms_add_up(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Clipped), plugin(One)):
        trainer = build(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
        trainer.train()
    plain = build(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    plain.train()
    assert logged(trainer, "loss")[0] - logged(plain, "loss")[0] == pytest.approx(1.5, abs=1e-5)


def test_token_wise_advantages_reach_a_replaced_loss(build: Any, plugin: Any) -> None:
    class Rising(Plugin):
        name = "rising"
        trainers = ("grpo",)

        @hookimpl
        def advantages(self, round: Any) -> torch.Tensor:
            steps = torch.arange(round.loss_mask.shape[1]).float()
            return round.advantages[round.local].unsqueeze(1) * steps

    stock_loss, own_loss = plugin(Rising), plugin(Clipped)
    with trl_ext.enable(stock_loss):
        plain = build(max_steps=2)
        plain.train()
    with trl_ext.enable(stock_loss, own_loss):
        trainer = build(max_steps=2)
        trainer.train()
    assert_close_training(plain, trainer, 1e-6)
