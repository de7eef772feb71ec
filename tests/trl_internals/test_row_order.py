"""Groups that stay together when TRL shuffles a round: the order, the wrapper, and two trainers at once."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from trl.trainer import grpo_trainer

import trl_ext
from trl_ext import ConfigError
from trl_ext.testing import metrics_of
from trl_ext.trl_internals import row_order
from trl_ext.trl_internals.row_order import GROUP_IDS, groups_in_a_row, keep_groups_together
from trl_ext_hooks import Plugin, hookimpl

STOCK = grpo_trainer.shuffle_sequence_dict


class Grouped(Plugin):
    name = "grouped"
    trainers = ("grpo",)
    needs = ("grouped_order",)

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.groups: list[list[int]] = []

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.groups.append(loss.group_ids.tolist())


@pytest.fixture(autouse=True)
def stock_afterwards() -> Iterator[None]:
    yield
    assert grpo_trainer.shuffle_sequence_dict is STOCK


def in_a_row(groups: list[int]) -> bool:
    return sum(left != right for left, right in itertools.pairwise(groups)) == len(set(groups)) - 1


def test_the_order_is_the_permutation_with_groups_moved_together() -> None:
    group_ids = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    permutation = torch.tensor([7, 0, 3, 8, 2, 4, 6, 1, 5])
    assert groups_in_a_row(permutation, group_ids).tolist() == [7, 8, 6, 0, 2, 1, 3, 4, 5]


def test_a_round_without_groups_is_shuffled_by_trl_itself() -> None:
    batch = {"x": torch.arange(8), "y": list("abcdefgh"), "none": None, "scalar": torch.tensor(3.0)}
    undo = keep_groups_together("grpo")
    torch.manual_seed(0)
    wrapped = grpo_trainer.shuffle_sequence_dict(dict(batch))
    torch.manual_seed(0)
    stock = STOCK(dict(batch))
    undo()
    assert torch.equal(wrapped["x"], stock["x"]) and wrapped["y"] == stock["y"] and wrapped["none"] is None


def test_a_round_with_groups_draws_what_trl_draws_and_keeps_rows_whole() -> None:
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    batch = {GROUP_IDS: ids, "x": torch.arange(8), "y": list(range(8)), "none": None, "scalar": torch.tensor(3.0)}
    undo = keep_groups_together("grpo")
    torch.manual_seed(0)
    shuffled = grpo_trainer.shuffle_sequence_dict(batch)
    after = torch.rand(())
    torch.manual_seed(0)
    STOCK(batch)
    assert torch.equal(after, torch.rand(()))  # the random stream goes on as in plain TRL
    undo()
    assert in_a_row(shuffled[GROUP_IDS].tolist())
    assert shuffled["x"].tolist() == shuffled["y"] and torch.equal(shuffled["x"] // 2, shuffled[GROUP_IDS])
    assert shuffled["none"] is None and shuffled["scalar"] == 3.0


def test_the_original_is_back_when_the_last_user_has_undone() -> None:
    first, second = keep_groups_together("grpo"), keep_groups_together("grpo")
    first()
    assert grpo_trainer.shuffle_sequence_dict is not STOCK
    second()
    assert grpo_trainer.shuffle_sequence_dict is STOCK


def test_a_trainer_that_is_collected_meanwhile_undoes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python collects dropped trainers wherever it likes, also while another trainer is being wrapped."""
    first = keep_groups_together("grpo")
    wrapped_for_second: list[bool] = []

    class Collects(dict[str, set[object]]):
        def setdefault(self, *args: Any) -> Any:
            first()
            return super().setdefault(*args)

    def wrap() -> None:
        second = keep_groups_together("grpo")
        wrapped_for_second.append(grpo_trainer.shuffle_sequence_dict is not STOCK)
        second()
        second()  # twice is as once

    monkeypatch.setattr(row_order, "_users", Collects(row_order._users))
    thread = threading.Thread(target=wrap, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "it waits for the lock that it holds itself"
    assert wrapped_for_second == [True] and grpo_trainer.shuffle_sequence_dict is STOCK


def test_a_replacement_in_between_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    undo = keep_groups_together("grpo")
    with monkeypatch.context() as patch:
        patch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)
        with pytest.raises(ConfigError, match="shuffle_sequence_dict was replaced after trl_ext wrapped it"):
            undo()
    grpo_trainer.shuffle_sequence_dict = STOCK


def test_detaching_puts_the_original_back(build: Any, plugin: Callable[[type], str]) -> None:
    trainer = trl_ext.attach(build(), plugin(Grouped))
    assert grpo_trainer.shuffle_sequence_dict is not STOCK
    trl_ext.detach(trainer)
    assert grpo_trainer.shuffle_sequence_dict is STOCK


def test_a_trainer_that_is_dropped_with_its_plugins_leaves_nothing(build: Any, plugin: Callable[[type], str]) -> None:
    trainer = trl_ext.attach(build(), plugin(Grouped))
    assert grpo_trainer.shuffle_sequence_dict is not STOCK
    del trainer
    gc.collect()
    assert grpo_trainer.shuffle_sequence_dict is STOCK


def test_a_trainer_inside_the_round_of_another_is_not_disturbed(build: Any, plugin: Callable[[type], str]) -> None:
    """A plain trainer trains to its end in the middle of a round of one whose groups are kept."""
    settings = {"num_generations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    alone = build(**settings)
    torch.manual_seed(7)
    alone.train()
    inner = build(**settings)

    class Nests(Grouped):
        @hookimpl
        def annotate(self, rollout: Any) -> None:
            if inner.state.global_step == 0:
                with torch.random.fork_rng():
                    torch.manual_seed(7)
                    inner.train()

    with trl_ext.enable(plugin(Nests)):
        outer = build(**settings)
        outer.train()
        groups = outer._trl_ext.plugins["grouped"].groups
    assert metrics_of(inner) == metrics_of(alone)
    assert groups and all(in_a_row(batch) for batch in groups)


def test_two_trainers_in_threads_do_not_disturb_each_other(build: Any, plugin: Callable[[type], str]) -> None:
    settings = {"num_generations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainers = [trl_ext.attach(build(max_steps=4, **settings), plugin(Grouped)) for _ in range(2)]
    plain = build(max_steps=4, **settings)
    failures: list[BaseException] = []

    def run(trainer: Any) -> None:
        try:
            trainer.train()
        except BaseException as error:  # shown below, in the thread of the test
            failures.append(error)

    threads = [threading.Thread(target=run, args=(trainer,), daemon=True) for trainer in (*trainers, plain)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failures and not any(thread.is_alive() for thread in threads)
    for trainer in trainers:
        groups = trainer._trl_ext.plugins["grouped"].groups
        assert len(groups) == 8 and all(in_a_row(batch) for batch in groups)
        trl_ext.detach(trainer)
    assert plain.state.global_step == 4
