"""What goes into a checkpoint: it can be read back, and a run learns before its first step if it cannot."""

from __future__ import annotations

import enum
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch

import trl_ext
from trl_ext import ConfigError, PluginError
from trl_ext.engine.checkpoint import STATE_FILE, option_texts
from trl_ext_hooks import Plugin, hookimpl, option

SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}


class Level(enum.IntEnum):
    LOW = 1


class Keeps(Plugin):
    """Keeps what a test gives it, by its hooks."""

    name = "keeps"
    trainers = ("grpo",)
    thing: Any = 0
    later: Any = None
    """What the first round makes of `thing`; None leaves it."""

    @hookimpl
    def advantages(self, round: Any) -> None:
        if self.later is not None:
            self.thing = self.later

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"thing": self.thing}

    @hookimpl
    def load_state_dict(self, state: Any) -> None:
        self.thing = state["thing"]


class Declares(Plugin):
    """Keeps it as an attribute that the core saves."""

    name = "declares"
    trainers = ("grpo",)
    state = ("thing",)
    thing: Any = 0
    later: Any = None

    @hookimpl
    def advantages(self, round: Any) -> None:
        if self.later is not None:
            self.thing = self.later


def variant(cls: type[Plugin], **attributes: Any) -> type[Plugin]:
    return type(cls.__name__, (cls,), attributes)


@pytest.mark.parametrize("cls", [Keeps, Declares])
@pytest.mark.parametrize("when", ["thing", "later"])
def test_numbers_of_numpy_come_back_as_numbers(cls: type[Plugin], when: str, build: Any, plugin: Any) -> None:
    value = {"a": [np.float64(0.5), (np.int32(3), np.bool_(True))], "b": torch.ones(1), np.int64(4): 1}
    with trl_ext.enable(plugin(variant(cls, **{when: value}))):
        trainer = build(**SAVES)
        trainer.train()
        again = build(**SAVES | {"max_steps": 2})
        again.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-1"))
        (saved,) = torch.load(Path(trainer.args.output_dir) / "checkpoint-1" / STATE_FILE)["plugins"].values()
    thing = saved["state"]["thing"]
    assert thing == {"a": [0.5, (3, True)], "b": torch.ones(1), 4: 1}
    assert type(thing["a"][0]) is float and type(thing["a"][1][0]) is int


@pytest.mark.parametrize("cls", [Keeps, Declares])
@pytest.mark.parametrize("thing", [lambda: None, Lock(), Level.LOW, [np.zeros(2)], object(), {"deep": {1: Level.LOW}}])
def test_what_cannot_be_read_back_is_refused_before_the_first_step(
    cls: type[Plugin], thing: Any, build: Any, plugin: Any
) -> None:
    with trl_ext.enable(plugin(variant(cls, thing=staticmethod(thing) if callable(thing) else thing))):
        with pytest.raises(PluginError, match=rf"plugin '{cls.name}'.*'thing'.* state"):
            build(**SAVES)
        build(save_strategy="no")  # a run without checkpoints needs none of this


@pytest.mark.parametrize("cls", [Keeps, Declares])
def test_what_the_first_round_makes_is_tried_after_it(cls: type[Plugin], build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(variant(cls, later=Level.LOW))):
        trainer = build(**SAVES | {"max_steps": 3, "save_steps": 3})
        with pytest.raises(PluginError, match="'thing'"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_a_state_that_the_first_round_makes(build: Any, plugin: Any) -> None:
    class Lazy(Keeps):
        later = 1

        @hookimpl
        def state_dict(self) -> dict[str, Any]:
            return {"thing": 1 / self.thing}

    with trl_ext.enable(plugin(Lazy)):
        trainer = build(**SAVES)
        trainer.train()
        assert trainer._trl_ext.calls["keeps", "state_dict"] == 1  # trials do not count


def test_a_state_that_cannot_be_made_after_the_first_step(build: Any, plugin: Any) -> None:
    class Broken(Keeps):
        @hookimpl
        def state_dict(self) -> dict[str, Any]:
            return {"thing": 1 / self.thing}

    with trl_ext.enable(plugin(Broken)):
        trainer = build(**SAVES | {"save_steps": 10, "max_steps": 2})
        with pytest.raises(ZeroDivisionError, match="'state_dict' of the trl_ext plugin 'keeps'"):
            trainer.train()


def test_a_file_that_cannot_be_read_says_what_to_do(build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Keeps)):
        trainer = build(**SAVES)
        trainer.train()
        folder = Path(trainer.args.output_dir) / "checkpoint-1"
        for content in (b"", b"half a file"):
            (folder / STATE_FILE).write_bytes(content)
            with pytest.raises(ConfigError, match=f"{STATE_FILE} cannot be read .*delete this file"):
                build(**SAVES).train(resume_from_checkpoint=str(folder))
        (folder / STATE_FILE).unlink()
        with pytest.warns(UserWarning, match="now starts fresh"):
            build(**SAVES | {"max_steps": 2}).train(resume_from_checkpoint=str(folder))


# --- options ---


@dataclass(frozen=True)
class Inner:
    weight: float = 1.0


@dataclass(frozen=True)
class Anything:
    rule: Any = option(len, help="a function")
    lock: Any = option(None, help="what cannot be copied")
    rate: float = option(0.5, help="a number")
    inner: Inner = option(Inner(), help="nested")


class Chooses(Plugin):
    name = "chooses"
    trainers = ("grpo",)
    Options = Anything

    @hookimpl
    def advantages(self, round: Any) -> None:
        return None


@pytest.fixture
def trained(build: Any, plugin: Any) -> Callable[..., Any]:
    """`trained(options)` makes a run with a checkpoint; `trained(options, folder)` goes on from one."""
    reference = plugin(Chooses)

    def run(options: dict[str, Any], folder: Path | None = None) -> Path:
        with trl_ext.enable({reference: options}):
            trainer = build(**SAVES | {"max_steps": 1 if folder is None else 2})
            trainer.train(resume_from_checkpoint=None if folder is None else str(folder))
        return Path(trainer.args.output_dir) / "checkpoint-1"

    return run


def test_options_of_any_kind_are_saved_and_compared(trained: Any) -> None:
    options = {"rule": lambda text: len(text), "lock": Lock(), "rate": np.float64(0.25)}
    folder = trained(options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*with other options.*")
        # the next process has other objects, and plain numbers
        trained({"rule": options["rule"], "lock": Lock(), "rate": 0.25}, folder)
    with pytest.warns(UserWarning, match=r"with other options: rule=.*, rate=0.25, .* instead of .*") as caught:
        trained({"rule": max, "lock": Lock(), "rate": 0.25}, folder)
    assert any("rule=builtins.max" in str(warning.message) for warning in caught)


def test_a_checkpoint_with_the_options_themselves(trained: Any) -> None:
    """As versions before wrote it."""
    folder = trained({"rule": 1, "rate": 0.25})
    saved = torch.load(folder / STATE_FILE)
    saved["plugins"]["chooses"]["options"] = {"rule": 1, "lock": None, "rate": 0.25, "inner": {"weight": 1.0}}
    torch.save(saved, folder / STATE_FILE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*with other options.*")
        trained({"rule": 1, "rate": 0.25}, folder)
    with pytest.warns(UserWarning, match="with other options"):
        trained({"rule": 1, "rate": 0.5}, folder)


def test_texts_of_options() -> None:
    values = {"a": np.float32(0.5), "b": (1, [np.int64(2)]), "c": {"x": functools.partial(max, 1)}, "d": torch.relu}
    texts = option_texts(values)
    assert texts["a"] == "0.5" and texts["b"] == "[1, [2]]" and " at 0x" not in texts["c"]
    assert option_texts({"object": object()}) == option_texts({"object": object()})
