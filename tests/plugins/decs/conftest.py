"""Completions in which a letter is a token, and runs of DECS on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_plugins.decs import DECS

LONG = "try\n{a}\nso Wait, see\n{a}\nok Hmm, x\ny\nz</think>it is {a}"  # says it, says it again, goes on
SHORT = "try\n{a}\nso</think>it is {a}"
LATE = "try\nit\nso Wait, see\n{a}\nok</think>it is {a}"
SILENT = "try\nit\nso Wait, s\nt\nu</think>{a}"  # right, and no chunk says so
WRONG = "try\nit\nso Wait, s\nt\nu</think>no"

SCRIPTS: dict[str, list[list[str]]] = {
    # four completions for each of four prompts
    "all kinds": [[LONG, SHORT, LATE, SILENT], [LONG, WRONG, SHORT, WRONG], [WRONG] * 4, [LONG, LONG, SHORT, LATE]],
    "easy": [
        [LONG, SHORT, SHORT, SHORT],
        [LONG, WRONG, SHORT, WRONG],
        [LATE, WRONG, LONG, LONG],
        [SHORT, LONG, LONG, LATE],
    ],
}


class Script(Plugin):
    """Plays completions: what prompt `i+i=` is answered with is in the script."""

    name = "script"
    trainers = ("grpo",)
    script = SCRIPTS["all kinds"]

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.rounds: list[Any] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result, tokenizer = generate(prompts), trainer.processing_class
        start = trainer.process_index * len(prompts)
        texts = []
        for row, prompt in enumerate(prompts):
            number = int(prompt[-1]["content"].partition("+")[0])
            lines = self.script[number % len(self.script)]
            texts.append(lines[(start + row) % len(lines)].format(a=2 * number))
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        said = [[{"role": "assistant", "content": text}] for text in texts]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.rounds.append(round)


def ends_with_the_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    texts = [message[0]["content"].rpartition("</think>")[2] for message in completions]
    return [float(text.endswith(str(expected))) for text, expected in zip(texts, answer, strict=True)]


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def right() -> Any:
    return ends_with_the_answer


@pytest.fixture
def tokenizer(model: str) -> Any:
    """A letter a token, so that tokens can be counted as letters."""
    return PreTrainedTokenizerFast.from_pretrained(model)


@pytest.fixture
def run(build: Any, plugin: Any, tokenizer: Any) -> Any:
    """Trains with DECS on the script; the prompts come in order, all four in each round."""

    def start(
        script: str = "all kinds", *, resume: str | None = None, plugins: tuple[str, ...] = (), **changes: Any
    ) -> Any:
        options = {key: changes.pop(key) for key in list(changes) if key in DECS.Options.__dataclass_fields__}
        common = {
            "rewards": [ends_with_the_answer],
            "data": tiny_data().select(range(4)),
            "shuffle_dataset": False,
            "max_steps": 1,
        }
        common |= {"max_completion_length": 64, "per_device_train_batch_size": 16, "learning_rate": 0.05}
        common |= {"optim": "sgd", "trainer": {"processing_class": tokenizer} | changes.pop("trainer", {})}
        cls = type("Played", (Script,), {"script": SCRIPTS[script]})
        with trl_ext.enable(*plugins, plugin(cls), "decs", decs=options):
            trainer = build(**common | changes)
            trainer.train(resume_from_checkpoint=resume)
            trainer.decs = trainer._trl_ext.plugins["decs"]
            trainer.rounds = trainer._trl_ext.plugins["script"].rounds
        return trainer

    return start
