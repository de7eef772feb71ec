"""Completions in which a letter is a token, a stub in place of the policy, and runs of SPAE on them."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Generation, Plugin, hookimpl
from trl_ext_plugins.spae import SPAE

STEPS = [
    "so.\n\nit.\n\nok.\n\nsee</think>{a}",
    "so.\n\nno.\n\nthen</think>{a}.\n\nx",
    "hm?\n\nit</think>no",
    "so.\n\nit.\n\nit.\n\nit.\n\nno",
]
SCRIPT = {0: STEPS, 1: STEPS, 2: ["a.\n\nb{a}"] * 4, 3: ["a.\n\nbno", "a.\n\nbno", "c{a}", "d.\n\ne.\n\nf{a}"]}


class Play(Plugin):
    """Plays completions, and keeps rounds and what the model would have said."""

    name = "play"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []
        self.sampled: list[list[list[int]]] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Generation:
        result, tokenizer = generate(prompts), trainer.processing_class
        self.sampled.append(result.completion_ids)
        numbers = [int(prompt[-1]["content"].partition("+")[0]) for prompt in prompts]
        start = trainer.process_index * len(prompts)
        texts = [SCRIPT[n % 4][(start + row) % 4].format(a=2 * n) for row, n in enumerate(numbers)]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        said = [[{"role": "assistant", "content": text}] for text in texts]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


def holds_the_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(str(a) in message[0]["content"]) for message, a in zip(completions, answer, strict=True)]


@pytest.fixture
def scripted() -> type[Play]:
    return Play


@pytest.fixture
def right() -> Any:
    return holds_the_answer


@pytest.fixture
def tokenizer(model: str) -> Any:
    """A letter a token."""
    return PreTrainedTokenizerFast.from_pretrained(model)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A prober whose Acc and Conf rise with the step, and what it was asked."""
    module = types.ModuleType("probers_of_spae")
    module.asked = []  # type: ignore[attr-defined]

    def prober(probes: Any) -> list[tuple[float, float]]:
        module.asked.extend(probes)  # type: ignore[attr-defined]
        return [(min(0.3 + 0.35 * probe.step, 1.0), 0.98) for probe in probes]

    module.prober = prober  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def run(build: Any, plugin: Any, tokenizer: Any) -> Any:
    def start(*, plugins: tuple[str, ...] = (), method: bool = True, **changes: Any) -> Any:
        options = {key: changes.pop(key) for key in list(changes) if key in SPAE.Options.__dataclass_fields__}
        common = {
            "rewards": [holds_the_answer],
            "data": tiny_data().select(range(4)),
            "shuffle_dataset": False,
            "max_steps": 1,
        }
        common |= {"max_completion_length": 40, "per_device_train_batch_size": 16, "learning_rate": 0.05}
        common |= {"optim": "sgd", "trainer": {"processing_class": tokenizer} | changes.pop("trainer", {})}
        own = ["spae"] if method else []
        with trl_ext.enable(*plugins, plugin(Play), *own, **({"spae": options} if method else {})):
            trainer = build(**common | changes)
            trainer.train()
            played = trainer._trl_ext.plugins["play"]
            trainer.rounds, trainer.sampled = played.rounds, played.sampled
            trainer.spae = trainer._trl_ext.plugins.get("spae")
        return trainer

    return start
