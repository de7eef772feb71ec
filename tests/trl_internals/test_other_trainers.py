"""Trainers that get no plugins although some are enabled: said, or refused, and never passed over."""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.trainer.grpo_trainer as home
from transformers import Trainer, TrainingArguments
from trl import GRPOTrainer

import trl_ext
from trl_ext import ConfigError
from trl_ext.testing import tiny_trainer


def told(run: Callable[[], Any]) -> list[str]:
    """Returns the warnings of trl_ext."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [text for warning in caught if (text := str(warning.message)).startswith("trl_ext: ")]


class AsyncTrainer(Trainer):
    """Neither GRPOTrainer nor RLOOTrainer nor DPOTrainer, as most trainers of TRL."""


def other_trainer(folder: Path) -> Trainer:
    return AsyncTrainer(torch.nn.Linear(1, 1), TrainingArguments(str(folder), use_cpu=True, report_to="none"))


def test_a_trainer_of_another_kind_is_named_once(tmp_path: Path) -> None:
    def run() -> None:
        with trl_ext.enable("gdpo"):
            other_trainer(tmp_path)
            other_trainer(tmp_path)

    first, last = told(run)
    assert "test_other_trainers.AsyncTrainer takes no plugins, so it trains without gdpo" in first
    assert "no trainer of this process took gdpo" in last
    assert told(lambda: other_trainer(tmp_path)) == []


def test_a_block_in_which_a_trainer_took_the_plugins_says_nothing(build: Any) -> None:
    def run() -> None:
        with trl_ext.enable("gdpo"):
            build()

    assert told(run) == []


def test_a_trainer_of_the_block_before_does_not_count(build: Any) -> None:
    trainer = build()

    def run() -> None:
        with trl_ext.enable("gdpo"):
            trainer.train()

    (text,) = told(run)
    assert "use trl_ext.attach" in text


def test_a_block_that_an_error_ends_says_nothing_more() -> None:
    def run() -> None:
        with pytest.raises(KeyError), trl_ext.enable("gdpo"):
            raise KeyError

    assert told(run) == []


def test_the_end_of_the_process_says_it_for_a_handle_that_was_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    at_the_end: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_the_end.append)
    monkeypatch.setattr(atexit, "unregister", at_the_end.remove)
    handle = trl_ext.enable("gdpo")
    (text,) = told(at_the_end[0])
    assert "no trainer of this process took gdpo" in text
    handle.disable()
    assert at_the_end == []


def copied(name: str) -> type[Any]:
    """A class that does the same and is no subclass, as a library makes that patches TRL."""
    namespace = {key: value for key, value in vars(GRPOTrainer).items() if key not in ("__dict__", "__weakref__")}
    init = getattr(GRPOTrainer.__init__, "__wrapped__", GRPOTrainer.__init__)
    code = init.__code__
    # `super()` of the copy must mean the copy
    copy = type(name, GRPOTrainer.__bases__, namespace | {"__module__": "a_library"})
    cell = next(index for index, free in enumerate(code.co_freevars) if free == "__class__")
    closure = list(init.__closure__)
    closure[cell] = type(closure[cell])(copy)
    copy.__init__ = type(init)(code, init.__globals__, init.__name__, init.__defaults__, tuple(closure))
    copy.__init__.__kwdefaults__ = init.__kwdefaults__
    return copy


@pytest.mark.parametrize("places", [(trl, home), (trl,), (home,)])
def test_a_class_that_takes_the_place_of_trls_after_enable(
    places: tuple[Any, ...], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacement = copied("FasterGRPOTrainer")
    words = r"a_library\.FasterGRPOTrainer .* then call trl_ext\.enable"
    with trl_ext.enable("gdpo"), pytest.raises(ConfigError, match=words):
        for place in places:
            monkeypatch.setattr(place, "GRPOTrainer", replacement)
        tiny_trainer("grpo", model, tmp_path, cls=replacement)
    monkeypatch.undo()


def test_a_class_of_trl_from_before_a_reload(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user holds TRL's own class, and a library has put another in its place before `enable`."""
    replacement = copied("FasterGRPOTrainer")
    for place in (trl, home):
        monkeypatch.setattr(place, "GRPOTrainer", replacement)
    words = r"trl\.trainer\.grpo_trainer\.GRPOTrainer is not the class that"
    with trl_ext.enable("gdpo"), pytest.raises(ConfigError, match=words):
        tiny_trainer("grpo", model, tmp_path, cls=GRPOTrainer)
    monkeypatch.undo()


def test_the_way_out_works(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replacement = copied("FasterGRPOTrainer")
    for place in (trl, home):
        monkeypatch.setattr(place, "GRPOTrainer", replacement)
    with trl_ext.enable("gdpo") as handle:
        trainer = tiny_trainer("grpo", model, tmp_path, cls=replacement)
        assert handle.trainers == [trainer]
    monkeypatch.undo()


def test_a_subclass_that_skips_the_constructor(tmp_path: Path) -> None:
    class Skips(GRPOTrainer):
        def __init__(self) -> None:
            Trainer.__init__(self, torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True))

    words = r"Skips does not call GRPOTrainer.__init__, so it would train without gdpo"
    with trl_ext.enable("gdpo"), pytest.raises(ConfigError, match=words):
        Skips()


def test_a_wrap_of_another_library_around_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.__init__
    handle = trl_ext.enable("gdpo")
    ours = Trainer.__init__

    def theirs(self: Any, *args: Any, **kwargs: Any) -> None:
        ours(self, *args, **kwargs)

    Trainer.__init__ = theirs
    handle.disable()
    assert Trainer.__init__ is theirs and told(lambda: other_trainer(tmp_path)) == []
    Trainer.__init__ = original
