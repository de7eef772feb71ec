"""Checkpoints: plugin state is saved and restored, and a resumed run goes on bit by bit where that is possible."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext import PluginError
from trl_ext.engine.checkpoint import STATE_FILE
from trl_ext.testing import metrics_of
from trl_ext_hooks import Plugin, hookimpl, option


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    growth: float = option(0.5, help="growth of the advantages per round")
    steps: tuple[int, ...] = option((1, 2), help="not used")


class Memory(Plugin):
    """Advantages depend on everything seen so far, so a lost state shows in the parameters."""

    name = "memory"
    trainers = ("grpo", "rloo")
    Options = MemoryOptions

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds, self.total, self.log = 0, torch.zeros(2, dtype=torch.float64), [{"start": True}]

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.rounds += 1
        self.total += round.rewards.double().sum(0)
        self.log.append({"round": self.rounds})
        return round.advantages * (1 + self.options.growth * self.rounds + 0.1 * self.total.sum().float())

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "total": self.total, "log": self.log}

    @hookimpl
    def load_state_dict(self, state: Any) -> None:
        self.rounds, self.total, self.log = state["rounds"], state["total"], state["log"]


SETTINGS: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.05}


def memory(trainer: Any) -> Memory:
    return trainer._trl_ext.plugins["memory"]


@pytest.fixture
def resume(build: Any, tmp_path: Path) -> Callable[..., Any]:
    """Trains on from a copy of a checkpoint, in a folder of its own."""

    def run(kind: str, checkpoint: str | Path, **settings: Any) -> Any:
        trainer = build(kind, **SETTINGS | settings)
        copied = tmp_path / "copied" / Path(checkpoint).name
        shutil.copytree(checkpoint, copied, dirs_exist_ok=True)
        trainer.train(resume_from_checkpoint=str(copied))
        return trainer

    return run


def checkpoint(trainer: Any, step: int) -> Path:
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def assert_same(one: Any, other: Any) -> None:
    others = dict(other.model.named_parameters())
    for name, value in one.model.named_parameters():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("extra", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}])
def test_resuming_on_a_round_boundary_is_bit_exact(kind: str, extra: Any, build: Any, plugin: Any, resume: Any) -> None:
    with trl_ext.enable(plugin(Memory)):
        whole = build(kind, **SETTINGS, **extra)
        whole.train()
        resumed = resume(kind, checkpoint(whole, 2), **extra)
        first, second = memory(whole), memory(resumed)
    assert_same(whole, resumed)
    assert (
        (second.rounds, second.log)
        == (first.rounds, first.log)
        == (4, [{"start": True}] + [{"round": n} for n in (1, 2, 3, 4)])
    )
    assert torch.equal(first.total, second.total) and second.total.dtype == torch.float64
    assert metrics_of(resumed)[-2] == metrics_of(whole)[-2]


def test_a_lost_state_would_show(build: Any, plugin: Any, resume: Any) -> None:
    with trl_ext.enable(plugin(Memory)):
        whole = build(**SETTINGS)
        whole.train()
        (checkpoint(whole, 2) / STATE_FILE).unlink()
        with pytest.warns(UserWarning, match="was saved without plugin 'memory', which now starts fresh"):
            resumed = resume("grpo", checkpoint(whole, 2))
        assert memory(resumed).rounds == 2
    with pytest.raises(AssertionError):
        assert_same(whole, resumed)


def test_gdpo_resumes_bit_exactly(build: Any, resume: Any) -> None:
    with trl_ext.enable("gdpo"):
        whole = build(**SETTINGS)
        whole.train()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*plugin.*")
            assert_same(whole, resume("grpo", checkpoint(whole, 2)))


def test_off_a_boundary_the_round_is_generated_again(build: Any, plugin: Any, resume: Any) -> None:
    """A round serves two steps here. TRL does not save it, so a run resumed after its first step makes a new one."""
    with trl_ext.enable(plugin(Memory)):
        whole = build(num_iterations=2, **SETTINGS)
        whole.train()
        assert memory(whole).rounds == 2
        on = resume("grpo", checkpoint(whole, 2), num_iterations=2)
        assert_same(whole, on)
        off = resume("grpo", checkpoint(whole, 1), num_iterations=2)
        rounds = memory(off).rounds
        saved = torch.load(checkpoint(whole, 1) / STATE_FILE, weights_only=True)["plugins"]["memory"]["state"]
    assert saved["rounds"] == 1
    # steps 2, 3 and 4 are left, with a fresh round for steps 2 and 3, and one for step 4; the state went on from 1
    assert rounds == 3
    with pytest.raises(AssertionError):
        assert_same(whole, off)
    assert off.state.global_step == 4


def test_the_file_holds_versions_options_and_state(build: Any, plugin: Any) -> None:
    with trl_ext.enable("gdpo", plugin(Memory)):
        trainer = build(**SETTINGS | {"max_steps": 1})
        trainer.train()
    saved = torch.load(checkpoint(trainer, 1) / STATE_FILE, weights_only=True)
    assert list(saved) == ["plugins"] and set(saved["plugins"]) == {"gdpo", "memory"}
    assert saved["plugins"]["gdpo"]["version"] == trl_ext.__version__
    assert saved["plugins"]["gdpo"]["state"] is None
    assert saved["plugins"]["memory"]["options"] == {"growth": "0.5", "steps": "[1, 2]"}
    assert saved["plugins"]["memory"]["state"]["rounds"] == 1


def test_other_plugins_and_options_are_reported(build: Any, plugin: Any, resume: Any) -> None:
    reference = plugin(Memory)
    with trl_ext.enable(reference):
        whole = build(**SETTINGS | {"max_steps": 2})
        whole.train()
    with (
        trl_ext.enable({reference: {"growth": 0.25}}),
        pytest.warns(
            UserWarning, match=r"plugin 'memory' continues .* with other options: .*0\.25.* instead of .*0\.5"
        ),
    ):
        resume("grpo", checkpoint(whole, 2), max_steps=3)
    with trl_ext.enable("gdpo"), pytest.warns(UserWarning) as caught:
        resume("grpo", checkpoint(whole, 2), max_steps=3)
    texts = [str(entry.message) for entry in caught]
    assert any("was saved without plugin 'gdpo', which now starts fresh" in text for text in texts)
    assert any("was saved with plugin 'memory', which is not enabled now" in text for text in texts)


def test_a_checkpoint_with_plugins_resumes_in_plain_trl(build: Any, plugin: Any, resume: Any) -> None:
    with trl_ext.enable(plugin(Memory)):
        whole = build(**SETTINGS | {"max_steps": 2})
        whole.train()
    assert resume("grpo", checkpoint(whole, 2), max_steps=3).state.global_step == 3


def test_dpo_keeps_state_too(build: Any, plugin: Any, resume: Any) -> None:
    class Steps(Plugin):
        name = "steps"
        trainers = ("dpo",)
        count = 0

        @hookimpl
        def loss_inputs(self, batch: Any) -> None:
            self.count += 1

        @hookimpl
        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        @hookimpl
        def load_state_dict(self, state: Any) -> None:
            self.count = state["count"]

    with trl_ext.enable(plugin(Steps)):
        whole = build("dpo", **SETTINGS | {"max_steps": 2})
        whole.train()
        resumed = resume("dpo", checkpoint(whole, 1), max_steps=2)
        assert resumed._trl_ext.plugins["steps"].count == 2
    assert_same(whole, resumed)


def test_a_state_that_is_no_mapping_is_refused(build: Any, plugin: Any) -> None:
    class Bad(Memory):
        name = "bad"

        @hookimpl
        def state_dict(self) -> Any:
            return [1, 2]

    with (
        trl_ext.enable(plugin(Bad)),
        pytest.raises(PluginError, match="plugin 'bad' returned list from 'state_dict', expected a mapping"),
    ):
        build(**SETTINGS).train()
