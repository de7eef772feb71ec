"""Every way in has a way out that leaves no trace, and two trainers never share plugin instances."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer

import trl_ext
from trl_ext import ConfigError
from trl_ext.testing import metrics_of
from trl_ext.trl_internals import seams
from trl_ext_hooks import Plugin, hookimpl

TRAINERS = (GRPOTrainer, RLOOTrainer, DPOTrainer)


class Double(Plugin):
    """Visible wherever it acts."""

    name = "double"
    trainers = ("grpo", "rloo")

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds = 0
        self.events: list[str] = []

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.events.append("setup")
        trainer.add_callback(Counter(self))

    @hookimpl
    def teardown(self) -> None:
        self.events.append("teardown")

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.rounds += 1
        return 2 * round.advantages


class Counter(TrainerCallback):
    def __init__(self, owner: Double) -> None:
        self.owner = owner

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.owner.events.append("step")


def of(trainer: Any) -> Double:
    return trainer._trl_ext.plugins["double"]


@pytest.fixture
def double(plugin: Callable[[type], str]) -> str:
    return plugin(Double)


@pytest.fixture
def originals() -> dict[type, Any]:
    return {cls: cls.__init__ for cls in TRAINERS}


def assert_restored(originals: dict[type, Any]) -> None:
    for cls, function in originals.items():
        assert cls.__init__ is function


def test_disable_gives_back_constructor_and_classes(build: Any, double: str, originals: Any) -> None:
    handle = trl_ext.enable(double)
    assert GRPOTrainer.__init__ is not originals[GRPOTrainer]
    trainer = build()
    assert type(trainer) is not GRPOTrainer and isinstance(trainer, GRPOTrainer)
    assert type(trainer).__name__ == "GRPOTrainer" and type(trainer).__module__ == GRPOTrainer.__module__
    instance = of(trainer)
    handle.disable()
    assert_restored(originals)
    assert type(trainer) is GRPOTrainer
    assert not [name for name in vars(trainer) if "trl_ext" in name]
    assert instance.events == ["setup", "teardown"]
    assert not any(isinstance(callback, Counter) for callback in trainer.callback_handler.callbacks)
    handle.disable()  # again, for nothing
    assert_restored(originals)


def test_a_trainer_goes_on_as_plain_trl_after_disable(build: Any, double: str) -> None:
    plain = build()
    plain.train()
    with trl_ext.enable(double):
        trainer = build()
    trainer.train()
    assert metrics_of(trainer) == metrics_of(plain)


def test_leaving_the_block_disables_also_after_an_error(double: str, originals: Any) -> None:
    with pytest.raises(KeyError), trl_ext.enable(double):
        raise KeyError
    assert_restored(originals)


def test_a_second_enable_is_refused_and_the_first_one_stays(build: Any, double: str) -> None:
    with trl_ext.enable(double) as handle:
        with pytest.raises(
            ConfigError,
            match=r"<trl_ext: double on grpo, rloo> is already enabled, and gdpo was asked for\. To switch,",
        ):
            trl_ext.enable("gdpo")
        assert of(build()) is not None
        assert len(handle.trainers) == 1
    trl_ext.enable("gdpo").disable()


def test_a_handle_that_was_not_kept(build: Any, double: str, originals: Any) -> None:
    """A cell of a notebook that runs again changes nothing, and `disable` undoes all of its runs."""
    trl_ext.disable()  # nothing to do
    trl_ext.enable(double)
    trainer = build()
    trl_ext.enable(double)
    trl_ext.disable()
    assert_restored(originals)
    assert type(trainer) is GRPOTrainer
    with trl_ext.enable(double):
        assert of(build()) is not None


def test_an_enable_that_fails_half_way_leaves_nothing(double: str, originals: Any, monkeypatch: Any) -> None:
    known = seams.trainer_class

    def broken(kind: Any) -> Any:
        if kind == "dpo":
            raise ImportError("no such trainer")
        return known(kind)

    with monkeypatch.context() as patch, pytest.raises(ImportError):
        patch.setattr(seams, "trainer_class", broken)
        trl_ext.enable(double)
    assert_restored(originals)
    trl_ext.enable(double).disable()


def test_two_trainers_have_separate_plugins(build: Any, double: str) -> None:
    with trl_ext.enable(double) as handle:
        first, second = build(), build()
        assert of(first) is not of(second)
        first.train()
        assert (of(first).rounds, of(second).rounds) == (2, 0)
        second.train()
        assert set(handle.trainers) == {first, second}
        seen = [of(first), of(second)]
    assert [plugin.events for plugin in seen] == [["setup", "step", "step", "teardown"]] * 2


def test_the_handle_keeps_no_trainer_alive(build: Any, double: str) -> None:
    with trl_ext.enable(double) as handle:
        build()
        gc.collect()
        assert handle.trainers == []


def test_listeners_hear_of_every_trainer(build: Any, double: str) -> None:
    heard: list[Any] = []
    with trl_ext.enable(double) as handle:
        handle.on_trainer(heard.append)
        made = [build(), build("rloo")]
    assert heard == made


def test_attach_and_detach(build: Any, double: str, originals: Any) -> None:
    trainer, other = build(), build()
    assert trl_ext.attach(trainer, double) is trainer
    assert_restored(originals)
    assert type(other) is GRPOTrainer
    instance = of(trainer)
    trainer.train()
    assert instance.rounds == 2
    trl_ext.detach(trainer)
    assert type(trainer) is GRPOTrainer and instance.events[-1] == "teardown"
    with pytest.raises(ConfigError, match="this GRPOTrainer has no plugins"):
        trl_ext.detach(trainer)
    trl_ext.attach(trainer, "gdpo")
    assert type(trainer) is not GRPOTrainer
    trl_ext.detach(trainer)


def test_attach_twice_is_refused(build: Any, double: str) -> None:
    trainer = trl_ext.attach(build(), double)
    with pytest.raises(ConfigError, match=r"this GRPOTrainer already has plugins.* after trl_ext\.detach\(trainer\)"):
        trl_ext.attach(trainer, "gdpo")
    trainer.train()
    assert of(trainer).rounds == 2
    trl_ext.detach(trainer)
    trl_ext.attach(trainer, "gdpo")


def test_extend_leaves_the_base_alone(build: Any, double: str, originals: Any) -> None:
    extended = trl_ext.extend(GRPOTrainer, double)
    assert issubclass(extended, GRPOTrainer) and extended.__name__ == "GRPOTrainer"
    assert_restored(originals)
    trainer = build(cls=extended)
    trainer.train()
    assert of(trainer).rounds == 2
    trl_ext.detach(trainer)
    assert type(trainer) is extended
    assert type(build()) is GRPOTrainer


def test_extended_and_attached_again_is_refused(build: Any, double: str) -> None:
    trainer = build(cls=trl_ext.extend(GRPOTrainer, double))
    with pytest.raises(ConfigError, match="already has plugins"):
        trl_ext.attach(trainer, "gdpo")


class Mine(GRPOTrainer):
    """A user's subclass with a constructor of its own."""

    def __init__(self, *args: Any, flavour: str, **kwargs: Any) -> None:
        self.flavour = flavour
        super().__init__(*args, **kwargs)
        self.finished = True

    def taste(self) -> str:
        return self.flavour


class Positional(GRPOTrainer):
    """`args` is not the training arguments here, and keywords go by another name."""

    def __init__(self, *args: Any, **others: Any) -> None:
        super().__init__(*args, **others)


@pytest.mark.parametrize("way", ["enable", "attach", "extend"])
def test_a_users_subclass(way: str, build: Any, double: str, originals: Any) -> None:
    constructor = Mine.__init__
    extra = {"flavour": "plum"}
    if way == "enable":
        with trl_ext.enable(double):
            trainer = build(cls=Mine, trainer=extra)
            trainer.train()
            instance = of(trainer)
    elif way == "attach":
        trainer = trl_ext.attach(build(cls=Mine, trainer=extra), double)
        trainer.train()
        instance = of(trainer)
        trl_ext.detach(trainer)
    else:
        extended = trl_ext.extend(Mine, double)
        trainer = build(cls=extended, trainer=extra)
        trainer.train()
        instance = of(trainer)
        trl_ext.detach(trainer)
        assert type(trainer) is extended
    assert instance.rounds == 2
    assert trainer.taste() == "plum" and trainer.finished
    assert type(trainer) is (Mine if way != "extend" else extended)
    assert Mine.__init__ is constructor
    assert_restored(originals)


def test_extend_reads_arguments_given_by_position(build: Any, double: str) -> None:
    """The plan is made before the model is loaded, also where the constructor only says *args, **kwargs."""
    from trl_ext.testing import digits, tiny_args, tiny_data

    data, folder = tiny_data(), build().args.output_dir
    extended = trl_ext.extend(Positional, double)
    path = build().model.config._name_or_path
    trainer = extended(path, [digits], tiny_args("grpo", folder), train_dataset=data)
    trainer.train()
    assert of(trainer).rounds == 2
    with pytest.raises(ConfigError, match="all reward_weights are 0"):  # not "no such model"
        trl_ext.extend(Positional, "gdpo")(
            model="/no/such/model", reward_funcs=[digits], args=tiny_args("grpo", folder, reward_weights=[0.0])
        )


def test_a_constructor_wrapped_by_somebody_else_is_not_lost(double: str, originals: Any) -> None:
    handle = trl_ext.enable(double)
    ours = GRPOTrainer.__init__

    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)

    GRPOTrainer.__init__ = theirs
    with pytest.raises(
        ConfigError, match=r"GRPOTrainer.__init__ was wrapped again after trl_ext.enable; undo that wrap"
    ):
        handle.disable()
    assert GRPOTrainer.__init__ is theirs
    GRPOTrainer.__init__ = ours
    handle.disable()
    assert_restored(originals)


class BadTeardown(Double):
    name = "bad-teardown"

    @hookimpl
    def teardown(self) -> None:
        raise RuntimeError("stuck")


def test_a_failing_teardown_does_not_keep_the_rest(build: Any, plugin: Any, double: str, originals: Any) -> None:
    handle = trl_ext.enable(plugin(BadTeardown), double)
    first, second = build(), build()
    seen = [of(first), of(second)]
    with pytest.raises(RuntimeError, match="stuck\nraised in the hook 'teardown' of the trl_ext plugin 'bad-teardown'"):
        handle.disable()
    assert_restored(originals)
    for trainer in (first, second):
        assert type(trainer) is GRPOTrainer
        assert not any(isinstance(callback, Counter) for callback in trainer.callback_handler.callbacks)
    assert [plugin.events[-1] for plugin in seen] == ["teardown"] * 2


class BadSetup(Double):
    name = "bad-setup"

    @hookimpl
    def setup(self, trainer: Any) -> None:
        raise OSError("no disk")


def test_a_failing_setup_leaves_a_plain_trainer(build: Any, plugin: Any, double: str) -> None:
    trainer = build()
    with pytest.raises(OSError, match="no disk\nraised in the hook 'setup' of the trl_ext plugin 'bad-setup'"):
        trl_ext.attach(trainer, double, plugin(BadSetup))
    assert type(trainer) is GRPOTrainer and not hasattr(trainer, "_trl_ext")
    assert not any(isinstance(callback, Counter) for callback in trainer.callback_handler.callbacks)
    trainer.train()


def test_a_failing_constructor_leaves_nothing(build: Any, double: str, originals: Any) -> None:
    with trl_ext.enable(double) as handle:
        with pytest.raises(OSError):
            build(cls=lambda **arguments: GRPOTrainer(**arguments | {"model": "/no/such/model"}))
        assert handle.trainers == []
    assert_restored(originals)
