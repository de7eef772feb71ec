"""Rows, generation and fields per row in real trainers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from trl_ext.testing import tiny_data
from trl_ext_hooks import Plugin, hookimpl

ROUNDS = ("grpo", "rloo")


def own(trainer: Any, name: str) -> Any:
    return trainer._trl_ext.plugins[name]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class OnlyEven(Plugin):
    name = "only-even"
    trainers = ROUNDS
    needs = ("column:index",)

    @hookimpl
    def select_rows(self, rows: list[dict[str, Any]], trainer: Any) -> list[dict[str, Any]]:
        self.seen = [row["index"] for row in rows]
        self.mode = trainer.unwrapped_model.training
        data = tiny_data()
        return [data[2 * (i // 4)] for i in range(len(rows))]


@pytest.mark.parametrize("kind", ROUNDS)
def test_select_rows_replaces_the_prompts_of_training_rounds_only(kind: str, build: Any, plugin: Any) -> None:
    scored: list[list[int]] = []

    def record(completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        scored.append(list(index))
        return [float(i) for i in range(len(index))]

    with trl_ext.enable(plugin(OnlyEven)):
        trainer = build(kind, rewards=[record], trainer={"eval_dataset": tiny_data().select([3, 5])}, max_steps=1)
        trainer.train()
        assert scored == [[0, 0, 0, 0, 2, 2, 2, 2]]
        seen = own(trainer, "only-even").seen
        assert len(seen) == 8 and seen[:4] == [seen[0]] * 4
        scored.clear()
        trainer.evaluate()
    assert scored == [[3, 3, 3, 3, 5, 5, 5, 5]]


class Hint(Plugin):
    name = "hint"
    trainers = ROUNDS
    text = "Z"

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Any:
        return generate([[*prompt, {"role": "user", "content": self.text}] for prompt in prompts])


class Hint2(Hint):
    name = "hint-2"
    text = "Q"


@pytest.mark.parametrize("kind", ROUNDS)
def test_rollout_edits_prompts_and_the_first_plugin_is_outermost(kind: str, build: Any, plugin: Any) -> None:
    prompts_of_rewards: list[Any] = []

    def record(prompts: list[Any], **kwargs: Any) -> list[float]:
        prompts_of_rewards.extend(prompts)
        return [float(i) for i in range(len(prompts))]

    with trl_ext.enable(plugin(Hint), plugin(Hint2)):
        trainer = build(kind, rewards=[record], max_steps=1)
        trainer.train()
    ids = trainer._buffered_inputs[0]["prompt_ids"]
    texts = trainer.processing_class.batch_decode(ids)
    tail = "user\nZ<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert all(text.endswith(tail) for text in texts)
    assert all(len(prompt) == 1 for prompt in prompts_of_rewards)  # reward functions keep the prompt of the data


class SecondPass(Plugin):
    name = "second-pass"
    trainers = ROUNDS

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Any:
        self.first = generate(prompts)
        drafts = [completion[0]["content"] for completion in self.first.completions]
        self.second = generate([[{"role": "user", "content": draft}] for draft in drafts])
        return self.second


@pytest.mark.parametrize("kind", ROUNDS)
def test_a_rollout_may_have_two_passes(kind: str, build: Any, plugin: Any) -> None:
    with trl_ext.enable(plugin(SecondPass)):
        trainer = build(kind, max_steps=1)
        trainer.train()
        passes = own(trainer, "second-pass")
    shown = [text if isinstance(text, str) else text[0]["content"] for text in list(trainer._logs["completion"])]
    assert shown == [completion[0]["content"] for completion in passes.second.completions]
    assert shown != [completion[0]["content"] for completion in passes.first.completions]
    batch = trainer._buffered_inputs[0]
    trained = {
        tuple(row[mask.bool()].tolist())
        for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    }
    assert trained == {tuple(ids) for ids in passes.second.completion_ids}


class Annotator(Plugin):
    name = "annotator"
    trainers = ROUNDS
    fields = ("questions", "label")

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, Any]:
        self.ids = rollout.completion_ids
        lengths = torch.tensor([float(len(ids)) for ids in rollout.completion_ids])
        return {"questions": lengths, "label": [f"row{i}" for i in range(len(rollout.rows))]}

    @hookimpl
    def rewards(self, scored: Any) -> None:
        self.fields_seen, self.gathered = scored.fields, scored.gathered


@pytest.mark.parametrize("kind", ROUNDS)
def test_fields_reach_reward_functions_and_later_hooks(kind: str, build: Any, plugin: Any) -> None:
    given: dict[str, Any] = {}

    def record(completions: list[Any], questions: list[Any], label: list[str], **kwargs: Any) -> list[float]:
        given.update(questions=questions, label=label)
        return [float(q) for q in questions]

    with trl_ext.enable(plugin(Annotator)):
        trainer = build(kind, rewards=[record], max_steps=1)
        trainer.train()
        mine = own(trainer, "annotator")
    lengths = [float(len(ids)) for ids in mine.ids]
    assert [float(q) for q in given["questions"]] == lengths
    assert given["label"] == [f"row{i}" for i in range(8)]
    assert mine.gathered["questions"].tolist() == lengths and "label" not in mine.gathered
    assert mine.fields_seen["label"] == given["label"]
    assert logged(trainer, "rewards/record/mean") == [pytest.approx(sum(lengths) / 8)]
