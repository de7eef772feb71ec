"""What the core checks and gathers for plugins: losses with an advantage per token, lengths, the tokenizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import ConfigError
from trl_ext_hooks import Need, Plugin, hookimpl


class Tokenwise(Plugin):
    name = "tokenwise"
    trainers = ("grpo", "rloo")
    needs = ("token_advantages",)

    @hookimpl
    def advantages(self, round: Any) -> None:
        return None


class Conditional(Tokenwise):
    name = "conditional"
    needs = ()

    @hookimpl
    def configure(self, config: Any) -> list[Need]:
        return [Need("token_advantages")]


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo", "dr_grpo", "cispo", "sapo"])
def test_losses_that_take_one_advantage_per_token(loss_type: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Tokenwise)):
        assert build("grpo", loss_type=loss_type)._trl_ext.plan.needs == {"token_advantages": ("tokenwise",)}


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("importance_sampling_level", "sequence", "'token', it is 'sequence'"),
        ("loss_type", "luspo", "'dapo' or 'bnpo' or 'grpo' or 'dr_grpo' or 'cispo' or 'sapo', it is 'luspo'"),
        ("off_policy_mask_threshold", 0.5, "None, it is 0.5"),
    ],
)
@pytest.mark.parametrize("cls", [Tokenwise, Conditional])
def test_losses_that_take_one_per_row(
    setting: str, value: Any, wanted: str, cls: type[Plugin], build: Any, plugin: Any
) -> None:
    from trl import GRPOConfig

    if setting not in GRPOConfig.__dataclass_fields__:
        pytest.skip(f"this TRL has no {setting}")
    expected = f"{cls.name} needs {setting}={wanted}: the loss must take one advantage per token"
    with pytest.raises(ConfigError, match=re.escape(expected)), trl_ext.enable(plugin(cls)):
        build("grpo", **{setting: value})


def test_rloo_takes_one_per_row(build: Any, plugin: Any) -> None:
    expected = "tokenwise: the loss must take one advantage per token, and RLOO takes one per row; use GRPO"
    with pytest.raises(ConfigError, match=re.escape(expected)), trl_ext.enable(plugin(Tokenwise)):
        build("rloo")


def test_two_plugins_may_need_it(build: Any, plugin: Any) -> None:
    with trl_ext.enable({plugin(Tokenwise): None, plugin(Conditional): None}):
        assert build("grpo")._trl_ext.plan.needs["token_advantages"] == ("tokenwise", "conditional")


class Lengths(Plugin):
    """Reads the lengths before and after rows are left out, and counts the gathers of its own reads."""

    name = "lengths"
    trainers = ("grpo", "rloo")
    fields = ("row_lengths",)

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.tokenizer = trainer.tokenizer

    @hookimpl
    def advantages(self, round: Any) -> None:
        self.before, self.mask = round.lengths, round.loss_mask.sum(1)
        assert round.lengths is round.gathered_lengths

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        self.keep = round.group_ids != round.group_ids[0]
        return self.keep

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        self.after, self.mask_after = round.lengths, round.loss_mask.sum(1)
        return {"row_lengths": round.lengths[round.local]}


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_lengths_are_those_that_the_loss_counts(kind: str, train: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Lengths)):
        trainer = train(kind, max_steps=1)
        seen = trainer._trl_ext.plugins["lengths"]
    assert seen.before.tolist() == seen.mask.tolist() and min(seen.before) > 0
    assert seen.after.tolist() == seen.mask_after.tolist() == (seen.before * seen.keep).tolist()
    assert 0 < seen.after.sum() < seen.before.sum()
    assert seen.tokenizer is trainer.processing_class


def test_the_tokenizer_of_a_processor(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Lengths)):
        trainer = build("grpo")
        tokenizer = trainer.processing_class
        trainer.processing_class = type("Processor", (), {"tokenizer": tokenizer})()
        assert trainer._trl_ext.view.tokenizer is tokenizer
