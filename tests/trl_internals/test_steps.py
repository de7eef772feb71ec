"""Data that are too few for a step: refused before the model is loaded, or told at the end of training."""

from __future__ import annotations

from typing import Any

import pytest
from trl import GRPOTrainer

import trl_ext
from trl_ext import ConfigError
from trl_ext.testing import tiny_args, tiny_data
from trl_ext.trl_internals import steps

TOO_FEW: dict[str, Any] = {"gradient_accumulation_steps": 16}
"""A round of 32 prompts: 16 steps of 8 rows, 4 of them per prompt."""


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_fewer_prompts_than_a_round_takes(kind: Any, tmp_path: Any) -> None:
    words = r"has 16 prompts, and a round takes 32: 128 completions, 4 per prompt.*steps_per_generation=16"
    with pytest.raises(ConfigError, match=words):
        steps.check_rows(kind, tiny_args(kind, tmp_path, **TOO_FEW), tiny_data())


@pytest.mark.parametrize("change", [{"gradient_accumulation_steps": 8}, {"steps_per_generation": 2}])
def test_the_ways_out_train(change: dict[str, Any], build: Any) -> None:
    with trl_ext.enable("gdpo"):
        trainer = build(**TOO_FEW | {"per_device_train_batch_size": 8, "max_steps": 1} | change)
        trainer.train()
    assert trainer.state.global_step == 1


def test_pairs(tmp_path: Any) -> None:
    data = tiny_data("dpo", rows=4)
    steps.check_rows("dpo", tiny_args("dpo", tmp_path), data)
    with pytest.raises(ConfigError, match=r"has 4 rows, and with dataloader_drop_last=True a step takes 8"):
        steps.check_rows("dpo", tiny_args("dpo", tmp_path, dataloader_drop_last=True), data)
    with pytest.raises(ConfigError, match="the training data has no rows"):
        steps.check_rows("dpo", tiny_args("dpo", tmp_path), data.select([]))


def test_enable_refuses_before_the_model_is_loaded(build: Any) -> None:
    with trl_ext.enable("gdpo"), pytest.raises(ConfigError, match="a round takes 32"):
        build(model="/no/such/model", **TOO_FEW)
    with pytest.raises(ConfigError, match="a round takes 32"):
        trl_ext.attach(build(**TOO_FEW), "gdpo")


class Repeats(GRPOTrainer):
    """Reads the data in its own way, so their number says nothing."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return [0] * 256


def test_a_trainer_that_reads_the_data_in_its_own_way(build: Any) -> None:
    with trl_ext.enable("gdpo"):
        trainer = build(cls=Repeats, max_steps=1, **TOO_FEW)
        trainer.train()
    assert trainer.state.global_step == 1


def test_a_stream_that_is_too_short_ends_with_an_error(build: Any) -> None:
    with trl_ext.enable("gdpo"):
        trainer = build(data=tiny_data().to_iterable_dataset(), **TOO_FEW)
        with pytest.raises(ConfigError, match="training ended after step 0 of 2 without training anything"):
            trainer.train()


def test_a_finished_run_that_is_resumed_says_so(build: Any) -> None:
    with trl_ext.enable("gdpo"):
        trainer = build(max_steps=-1, num_train_epochs=1, per_device_train_batch_size=32, save_strategy="epoch")
        trainer.train()
        with pytest.warns(UserWarning, match="nothing was trained, since this run has 2 steps and began after step 2"):
            trainer.train(resume_from_checkpoint=True)
