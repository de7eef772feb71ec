"""Which constructors `enable` and `attach` reach, and with which arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import trl_ext
from tests import processes
from trl_ext import ConfigError
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, hookimpl


def test_attach_needs_a_trl_trainer() -> None:
    with pytest.raises(ConfigError, match="object is none of TRL's GRPOTrainer, RLOOTrainer and DPOTrainer"):
        trl_ext.attach(object(), "gdpo")


def test_the_trainer_may_be_imported_after_enable(model: str, tmp_path: Any) -> None:
    """In all other tests the import comes first."""
    script = f"""
import trl_ext
handle = trl_ext.enable("gdpo")
from trl import GRPOTrainer
from trl_ext.testing import tiny_trainer
trainer = tiny_trainer("grpo", {model!r}, {str(tmp_path)!r}, cls=GRPOTrainer, max_steps=1)
trainer.train()
assert any("gdpo/zero_std/digits" in entry for entry in trainer.state.log_history)
handle.disable()
assert type(trainer) is GRPOTrainer and GRPOTrainer.__init__.__qualname__ == "GRPOTrainer.__init__"
assert not hasattr(GRPOTrainer.__init__, "__wrapped__")
"""
    done = processes.run_python(script)
    assert done.returncode == 0, done.stderr


def test_trl_makes_its_own_arguments_when_none_are_given(model: str, monkeypatch: Any, tmp_path: Any) -> None:
    from trl_ext.testing import digits

    monkeypatch.chdir(tmp_path)
    default = functools.partial(GRPOConfig, use_cpu=True, bf16=False)
    monkeypatch.setattr("trl.trainer.grpo_trainer.GRPOConfig", default)
    with trl_ext.enable("gdpo"):
        trainer = GRPOTrainer(model=model, reward_funcs=[digits, digits], train_dataset=tiny_data())
        assert trainer._trl_ext.plan.kind == "grpo"


def test_the_constructor_of_all_trainers_is_given_back() -> None:
    from transformers import Trainer

    function = Trainer.__init__
    with trl_ext.enable("gdpo"):
        assert Trainer.__init__ is not function
    assert Trainer.__init__ is function


def test_options_by_name_reach_a_plugin_from_a_file(tmp_path: Any, build: Callable[..., Any]) -> None:
    """`enable("file.py", name={...})` is one plugin with options, not two."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from trl_ext_hooks import Plugin, option\n"
        "@dataclass(frozen=True)\n"
        "class Options:\n    size: int = option(1, help='a size')\n"
        "class Mine(Plugin):\n    name = 'mine'\n    trainers = ('grpo',)\n    Options = Options\n"
    )
    with trl_ext.enable(str(file), mine={"size": 3}) as handle:
        assert [spec.options.size for spec in handle.specs] == [3]


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_named_like_an_argument_of_reward_functions(name: str, build: Callable[..., Any]) -> None:
    data = tiny_data().add_column(name, ["x"] * 16)
    with trl_ext.enable("gdpo"):
        with pytest.raises(ConfigError, match=f"the training data has a column {name!r}.* Rename the column"):
            build(model="/no/such/model", data=data)
        build(data=data.rename_column(name, "other"))
        build(data=data, remove_unused_columns=True)  # which drops it


class OwnRewards(GRPOTrainer):
    """Calls reward functions in its own way."""

    def _calculate_rewards(self, inputs: Any, *args: Any) -> Any:
        inputs = [{key: value for key, value in row.items() if key != "prompts"} for row in inputs]
        return super()._calculate_rewards(inputs, *args)


def test_a_trainer_that_calls_reward_functions_in_its_own_way(build: Callable[..., Any]) -> None:
    with trl_ext.enable("gdpo"):
        build(cls=OwnRewards, data=tiny_data().add_column("prompts", ["x"] * 16), max_steps=1).train()


class Stops(TrainerCallback):
    """Ends training after the first step, in the middle of a round."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def all_seven(trainer: Any) -> bool:
    return all((batch["advantages"] == 7).all() for batch in trainer._buffered_inputs)


class Sevens(Plugin):
    name = "sevens"
    trainers = ("grpo", "rloo")

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return torch.full_like(round.advantages, 7.0)


@pytest.mark.parametrize(("kind", "end"), [("grpo", "stopped"), ("rloo", "stopped"), ("grpo", "interrupted")])
def test_attach_after_a_stopped_training(kind: str, end: str, build: Any, plugin: Any) -> None:
    """The rest of a round that TRL keeps was made without the plugins; TRL would go on with it."""
    trainer = build(kind, max_steps=4, steps_per_generation=4)
    if end == "stopped":
        trainer.add_callback(Stops())
        trainer.train()
        trainer.remove_callback(Stops)
    else:
        step, calls = trainer.training_step, []

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        trainer.training_step = interrupted
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        del trainer.training_step
    trl_ext.attach(trainer, plugin(Sevens))
    trainer.add_callback(Stops())
    trainer.train()
    assert all_seven(trainer)
    trl_ext.detach(trainer)  # and what the plugins made is not trained on without them
    trainer.train()
    assert not all_seven(trainer)


def test_a_device_without_float64_is_refused_before_a_model_is_loaded(build: Any, monkeypatch: Any) -> None:
    def make(**given: Any) -> Any:
        monkeypatch.setattr(GRPOConfig, "device", torch.device("mps"))
        return GRPOTrainer(**given | {"model": "/no/such/model"})

    with trl_ext.enable("gdpo"), pytest.raises(ConfigError, match="float64, which Apple's MPS device does not have"):
        build(cls=make)
