"""Fields that travel with their rows, and groups that stay together in micro-batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext.trl_internals.row_order import GROUP_IDS
from trl_ext_hooks import Plugin, hookimpl

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer.model.named_parameters())


class Carry(Plugin):
    """Fields that can be recomputed from the row that they belong to."""

    name = "carry"
    trainers = ROUNDS
    fields = ("key", "wide", "number")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rows = 0

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        ids = round.batch["completion_ids"]
        return {"key": ids.sum(1), "wide": ids[:, :2].float(), "number": torch.tensor(7.0)}

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        ids = loss.batch["completion_ids"]
        assert torch.equal(loss.batch["key"], ids.sum(1))
        assert torch.equal(loss.batch["wide"], ids[:, :2].float())
        assert loss.batch["number"].item() == 7.0
        self.rows += len(ids)


@pytest.mark.parametrize("kind", ROUNDS)
def test_batch_fields_travel_with_their_rows(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Carry)):
        trainer = build(kind, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
        trainer.train()
        assert own(trainer, "carry").rows == 16


class Grouped(Plugin):
    name = "grouped"
    trainers = ROUNDS
    needs = ("grouped_order",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.groups: list[list[int]] = []
        self.prompts: list[torch.Tensor] = []
        self.texts: list[Any] = []

    @hookimpl
    def annotate(self, rollout: Any) -> None:
        self.texts += rollout.completion_ids

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.groups.append(loss.batch[GROUP_IDS].tolist() if GROUP_IDS in loss.batch else [])
        self.prompts.append(loss.batch["prompt_ids"])


class Whole(Grouped):
    name = "whole"
    needs = ("whole_groups",)


class Watcher(Grouped):
    name = "watcher"
    needs = ()


@pytest.mark.parametrize("kind", ROUNDS)
@pytest.mark.parametrize("cls", [Whole, Grouped])
def test_groups_stay_whole_and_the_random_stream_stays_trls(kind: str, cls: Any, build: Any, plugin: Any) -> None:
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 3}
    settings |= {"loss_type": "grpo"} if kind == "grpo" else {}
    with trl_ext.enable(plugin(Watcher)):
        plain = build(kind, **settings)
        plain.train()
        before = own(plain, "watcher")
        random = torch.get_rng_state()
    with trl_ext.enable(plugin(cls)):
        trainer = build(kind, **settings)
        trainer.train()
        after = own(trainer, cls.name)
    assert all(len(set(groups)) == 1 and len(groups) == 4 for groups in after.groups)
    assert all((prompts == prompts[0]).all() for prompts in after.prompts)
    assert any(not (prompts == prompts[0]).all() for prompts in before.prompts)
    orders = [tuple(groups[0] for groups in after.groups[i : i + 4]) for i in (0, 4, 8)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len(set(orders)) > 1
    # same draws, so the same completions, and nearly the same parameters
    assert before.texts == after.texts
    assert torch.equal(random, torch.get_rng_state())
    for name, value in parameters(plain).items():
        torch.testing.assert_close(parameters(trainer)[name], value, atol=2e-4, rtol=0)


def test_groups_wider_than_a_micro_batch_stay_in_neighbouring_ones(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Grouped)):
        trainer = build(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=2)
        trainer.train()
        groups = own(trainer, "grouped").groups
    assert all(len(set(pair)) == 1 for pair in groups)
    assert all(groups[i] == groups[i + 1] for i in range(0, 8, 2))


def test_evaluation_is_not_reordered(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Whole)):
        trainer = build(trainer={"eval_dataset": tiny_data().select([3, 5])}, max_steps=1)
        trainer.train()
        mine = own(trainer, "whole")
        mine.groups.clear()
        trainer.evaluate()
    assert mine.groups == [[0, 0, 0, 0, 1, 1, 1, 1]]
