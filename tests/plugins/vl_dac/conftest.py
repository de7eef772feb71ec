"""Episodes with an environment that plays a script, and runs of VL-DAC on them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import digits, tiny_data
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_plugins.vl_dac import VLDAC

_spec = importlib.util.spec_from_file_location("shared_fixtures", Path(__file__).parents[2] / "conftest.py")
assert _spec and _spec.loader
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
tool_call = _shared.tool_call

SCRIPT = [
    [tool_call("go", pay=1), tool_call("go", pay=0), tool_call("end", pay=2), "bye"],
    ["nothing"],
    [tool_call("go", pay=0.5), "done"],
    [tool_call("crash"), tool_call("go", pay=3), "done"],
    [tool_call("go", pay=1), tool_call("stop"), "bye"],
    [tool_call("go", pay=77), "done"],
    [tool_call("go", pay=1)] * 6,  # more calls than the loop allows
    [tool_call("go", pay=1) + tool_call("go", pay=1), "done"],
]
"""An episode per row: a long one, one without any step of it, ..., one that loses its rewards, and so on."""


class Watch(Plugin):
    """Keeps rounds, micro-batches, and the policy at each step."""

    name = "watch"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []
        self.losses: list[Any] = []
        self.policies: list[list[torch.Tensor]] = []

    @hookimpl
    def setup(self, trainer: Any) -> None:
        self.policies.append([p.detach().clone() for p in trainer.unwrapped_model.parameters()])

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.losses.append(loss)

    @hookimpl
    def optimizer_step(self, trainer: Any) -> None:
        self.policies.append([p.detach().clone() for p in trainer.unwrapped_model.parameters()])


SMALL = {"head_sizes": [8], "value_warmup_iterations": 0}


@pytest.fixture
def run(build: Any, plugin: Any, tool_model: str, play: Any) -> Callable[..., Any]:
    """Trains on the script; options of the method and settings of the trainer by name."""

    def start(script: list[list[str]] | None = None, resume: str | None = None, **changes: Any) -> Any:
        options = SMALL | {k: changes.pop(k) for k in list(changes) if k in VLDAC.Options.__dataclass_fields__}
        environment = play(SCRIPT if script is None else script)
        held_out = {"eval_dataset": changes.pop("evaluate")} if "evaluate" in changes else {}
        common: dict[str, Any] = {"model": tool_model, "rewards": [digits], "data": tiny_data().select(range(4))}
        common |= {"max_completion_length": 300, "max_tool_calling_iterations": 4, "num_generations": 2, "max_steps": 1}
        common |= {"trainer": {"environment_factory": environment, **held_out}, "optim": "sgd", "learning_rate": 0.05}
        with trl_ext.enable({plugin(Watch): None, "vl-dac": options}):
            trainer = build(**common | changes)
            trainer.train(resume_from_checkpoint=resume)
            plugins = trainer._trl_ext.plugins
            trainer.watch, trainer.method = plugins["watch"], plugins["vl-dac"]
        return trainer

    return start


@pytest.fixture
def call() -> Callable[..., str]:
    return tool_call
