"""A token-wise plugin with views, rewards that are easy to compute by hand, and a run that records them.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 rounds.py MODEL FOLDER

Completions are fixed by the number of the row among all processes' rows, so that the rounds do not depend on how many
processes share them.
"""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import torch

import trl_ext
from trl_ext.testing import tiny_data, tiny_trainer
from trl_ext_hooks import Curve, Plugin, Rewards, Span, Views, hookimpl

ROWS, GROUP = 12, 4  # of all processes: two processes have 6 each, so the second group lies on both
TEXTS = (
    "<script>document.title='owned'</script> 12",
    "</script><img src=x onerror=alert(1)>",
    "Add. Then 7\n\nCheck 77",
    "no & <b>idea</b>",
    "3 3 3 3",
)


def text_of(row: int) -> str:
    """The completion of a row of all processes, the same in every round."""
    return TEXTS[(3 * row + row // GROUP) % len(TEXTS)]


class Steps(Plugin):
    """Fixed completions with a step per half, token-wise advantages, a reward of its own and everything to look at."""

    name = "steps"
    trainers = ("grpo",)
    fields = ("letters", "note", "doubt", "share")

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result = generate(prompts)
        start = trainer.process_index * len(prompts)
        texts = [text_of(row) for row in range(start, start + len(prompts))]
        ids = [trainer.processing_class(text)["input_ids"] for text in texts]  # a token per letter
        return dataclasses.replace(
            result, completion_ids=ids, completions=[[{"role": "assistant", "content": text}] for text in texts]
        )

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, Any]:
        texts = [completion[0]["content"] for completion in rollout.completions]
        return {"letters": torch.tensor([float(len(text)) for text in texts]), "note": [text[:3] for text in texts]}

    @hookimpl
    def reward_columns(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return (*names, "bonus")

    @hookimpl
    def rewards(self, scored: Any) -> Rewards:
        bonus = scored.gathered["letters"].unsqueeze(1) / 100
        names = (*scored.reward_names, "bonus")
        weights = torch.cat([scored.reward_weights, torch.tensor([0.5])])
        return Rewards(torch.cat([scored.rewards, bonus], dim=1), names, weights)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        self.middle = [len(ids) // 2 for ids in round.completion_ids]
        position = torch.arange(round.loss_mask.shape[1])
        second = position >= torch.tensor(self.middle).unsqueeze(1)
        return torch.where(second, 0.5 * round.token_advantages, round.token_advantages)

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        doubt = torch.cos(round.batch["completion_ids"].float()) * round.loss_mask
        return {"doubt": doubt, "share": round.loss_mask.sum(1) / 100}

    @hookimpl
    def inspect(self, round: Any) -> Views:
        torch.rand(10)  # must not move the random stream of training
        spans, curves = [], []
        for row, ids in enumerate(round.completion_ids):
            middle = self.middle[row]
            spans += [Span(row, 0, middle, "half 1"), Span(row, middle, len(ids), "half 2", value=float(middle))]
            curves.append(Curve(row, "progress", [0, middle, len(ids) - 1], torch.tensor([0.0, float("nan"), 1.0])))
        return Views(spans, curves)


def numbers(completions: list[Any], **kwargs: Any) -> list[float]:
    """Share of digits."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter.isdigit() for letter in text) / len(text) for text in texts]


def brief(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """1 over the length; nothing for the longest."""
    return [None if len(ids) > 38 else 1.0 / len(ids) for ids in completion_ids]


def publish(cls: type) -> str:
    module = types.ModuleType(f"made_{cls.__name__.lower()}")
    module.Made = cls  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return f"{module.__name__}:Made"


def train(model: str, folder: Path, world: int = 1, record: int = 2, **settings: Any) -> Any:
    """Trains with GDPO and the plugin above, and records the first rounds."""
    with trl_ext.enable("gdpo", publish(Steps)) as handle:
        if record:
            handle.record(record)
        trainer = tiny_trainer(
            "grpo",
            model,
            folder,
            rewards=[numbers, brief],
            data=tiny_data(rows=12),
            **{"num_generations": GROUP, "per_device_train_batch_size": ROWS // world, "max_steps": 3} | settings,
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    from accelerate import PartialState

    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), PartialState(cpu=True).num_processes)
    torch.distributed.destroy_process_group()
