"""`state`: attributes that the core saves and sets again."""

from __future__ import annotations

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import PluginError
from trl_ext.engine.checkpoint import STATE_FILE
from trl_ext_hooks import Plugin, hookimpl

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


class Remembers(Plugin):
    name = "remembers"
    trainers = ("grpo", "rloo")
    state = ("rounds", "total", "log")

    def start(self) -> None:
        self.rounds, self.total, self.log = 0, torch.zeros(2, dtype=torch.float64), [{"start": True}]

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.rounds += 1
        self.total += round.rewards.double().sum(0)
        self.log.append({"round": self.rounds})
        return round.advantages * (1 + 0.5 * self.rounds + 0.1 * self.total.sum().float())


def held(trainer: Any) -> Any:
    return trainer._trl_ext.plugins[next(iter(trainer._trl_ext.plugins))]


def moved(trainer: Any, tmp_path: Path, step: int) -> Path:
    return Path(shutil.copytree(Path(trainer.args.output_dir) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}"))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_resumed_run_goes_on_with_it(kind: str, build: Any, plugin: Any, tmp_path: Path) -> None:
    with trl_ext.enable(plugin(Remembers)):
        whole = build(kind, max_steps=3, **SETTINGS)
        whole.train()
        resumed = build(kind, max_steps=3, **SETTINGS)
        resumed.train(resume_from_checkpoint=str(moved(whole, tmp_path, 1)))
        assert held(resumed).rounds == held(whole).rounds == 3
        assert torch.equal(held(resumed).total, held(whole).total) and held(resumed).log == held(whole).log
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name]), name


def test_a_tensor_comes_back_with_its_type(build: Any, plugin: Any, tmp_path: Path) -> None:
    with trl_ext.enable(plugin(Remembers)):
        trainer = build("grpo", max_steps=1, **SETTINGS)
        trainer.train()
    saved = torch.load(moved(trainer, tmp_path, 1) / STATE_FILE, weights_only=True)["plugins"]["remembers"]["state"]
    assert set(saved) == {"rounds", "total", "log"} and saved["total"].dtype == torch.float64


class Holds(Plugin):
    """Holds what a test gives it."""

    name = "holds"
    trainers = ("grpo",)
    state = ("thing",)
    thing: Any = None

    @hookimpl
    def advantages(self, round: Any) -> None:
        return None


class Lacks(Holds):
    name = "lacks"
    state = ("nothing",)


def test_an_attribute_without_a_first_value_is_refused(build: Any, plugin: Any) -> None:
    expected = "plugin 'lacks' declares the attribute 'nothing' as its `state` and does not have it. Give it a first"
    with pytest.raises(PluginError, match=re.escape(expected)), trl_ext.enable(plugin(Lacks)):
        build("grpo")


@pytest.mark.parametrize("thing", [object(), {"a": [object()]}, torch.nn.Linear(1, 1), {1, 2}])
def test_what_cannot_be_read_back_is_refused_when_it_is_saved(thing: Any, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(Holds)):
        trainer = build("grpo", max_steps=1, **SETTINGS)
        held(trainer).thing = thing
        with pytest.raises(PluginError, match=r"the attribute 'thing' as its state, and it holds a \w+, expected"):
            trainer.train()


class Grown(Remembers):
    """A later version of the plugin, which remembers more."""

    state = ("rounds", "total", "log", "peak")

    def start(self) -> None:
        super().start()
        self.peak = -1.0


def test_a_checkpoint_of_an_older_version_says_what_it_lacks(build: Any, plugin: Any, tmp_path: Path) -> None:
    with trl_ext.enable(plugin(Remembers)):
        trainer = build("grpo", max_steps=1, **SETTINGS)
        trainer.train()
    checkpoint = moved(trainer, tmp_path, 1)
    with trl_ext.enable(plugin(Grown)):
        later = build("grpo", max_steps=2, **SETTINGS)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            later.train(resume_from_checkpoint=str(checkpoint))
        assert held(later).peak == -1.0 and held(later).rounds == 2
    told = [str(warning.message) for warning in caught if "holds no 'peak'" in str(warning.message)]
    assert len(told) == 1 and "of plugin 'remembers', which now starts fresh" in told[0]
