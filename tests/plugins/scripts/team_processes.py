"""Trains a team with Dr. MAS on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 team_processes.py MODEL FOLDER

Answers are made from the number of the row among all processes' rows and from the question, so that the data do not
depend on how many processes share them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

import trl_ext
from tests.plugins.dr_mas.teams import Pair, by_agent
from trl_ext.testing import metrics_of, tiny_data, tiny_trainer
from trl_ext_hooks import Plugin, hookimpl

torch.set_num_threads(1)

ROWS = 12  # of all processes: two processes have 6 each, so the second group lies on both


class Uneven(Pair):
    """Corrects four answers on the first of two processes and one on the second, which has to be filled up."""

    corrected = frozenset({0, 1, 4, 5, 9})


class Known(Plugin):
    """Answers of known content, and what was made of them."""

    name = "known"
    trainers = ("grpo",)
    state = ("round",)

    def start(self) -> None:
        self.round = 0
        self.seen: list[dict[str, Any]] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any, context: Any) -> Any:
        result, ids = generate(prompts), []
        for number, prompt in zip(context.row_numbers, prompts, strict=True):
            tag = 5 * number + 3 * self.round + len(prompt[-1]["content"]) % 5
            ids.append([10 + (7 * tag + i * i) % 80 for i in range(1 + tag % 6)])
        said = [[{"role": "assistant", "content": trainer.tokenizer.decode(row)}] for row in ids]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.round += 1
        real = (round.group_ids >= 0).tolist()
        everything = {
            "agent": round.trainer.gather_objects(list(round.fields["agent"])),
            "trajectory": round.trainer.gather_objects(list(round.fields["trajectory"])),
            "rewards": round.rewards[:, 0].tolist(),
            "advantages": round.advantages.tolist(),
        }
        seen = {
            name: [value for value, kept in zip(values, real, strict=True) if kept]
            for name, values in everything.items()
        }
        self.seen.append({**seen, "filled": real.count(False)})


def publish(cls: type) -> str:
    module = types.ModuleType(f"made_{cls.__name__.lower()}")
    module.Made = cls  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return f"{module.__name__}:Made"


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}

    def train(name: str, options: dict[str, Any], resume: str | None = None, **settings: Any) -> None:
        with trl_ext.enable({publish(Uneven): None, publish(Known): None, "dr-mas": options}):
            trainer = tiny_trainer(
                "grpo",
                model,
                folder / f"{name.removesuffix('-resumed')}-{world}",
                rewards=[by_agent],
                data=tiny_data(rows=3),
                per_device_train_batch_size=ROWS // world,
                shuffle_dataset=False,
                optim="sgd",
                learning_rate=0.05,
                max_steps=3,
                seed=7,
                **settings,
            )
            trainer.train(resume_from_checkpoint=resume)
            parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            torch.save({n: p.detach() for n, p in parameters}, folder / f"{name}-{world}-{rank}.pt")
            report[name] = {"rounds": trainer._trl_ext.plugins["known"].seen, "metrics": metrics_of(trainer)}

    train("prompt", {}, save_strategy="steps", save_steps=1)
    train("prompt-resumed", {}, str(folder / f"prompt-{world}" / "checkpoint-1"))
    train("trajectory", {"normalise": "trajectory"})
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
