"""Trains VERL and dynamic reward weighting on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 weights_processes.py MODEL FOLDER

Completions are made from the number of the row among all processes' rows, so that the data do not depend on how many
processes share them.
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
from trl_ext.testing import metrics_of, tiny_data, tiny_trainer
from trl_ext_hooks import Plugin, hookimpl

torch.set_num_threads(1)

ROWS, GROUP = 12, 4  # of all processes: two processes have 6 each, so the second group lies on both


class Scripted(Plugin):
    """Completions of known content, and what was made of them."""

    name = "scripted"
    trainers = ("grpo",)
    state = ("turn",)

    def start(self) -> None:
        self.turn = 0
        self.seen: dict[str, list[Any]] = {"advantages": [], "weights": []}

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result = generate(prompts)
        ids = []
        for row in range(trainer.process_index * len(prompts), (trainer.process_index + 1) * len(prompts)):
            length = 1 + (5 * row + 2 * self.turn) % 9
            ids.append([10 + (13 * row + 7 * place * place + 3 * self.turn) % 80 for place in range(length)])
        said = [[{"role": "assistant", "content": trainer.processing_class.decode(row)}] for row in ids]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.turn += 1
        self.seen["advantages"].append(round.advantages.tolist())
        self.seen["weights"].append(round.reward_weights.tolist())


def spread(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) / 3 for ids in completion_ids]


def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [1.0 / len(ids) for ids in completion_ids]


RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "verl": {"verl-rank": {"stride": 2}},
    "gradient": {"dynamic-weights": {"way": "gradient", "regularization": 0.02}},
    "volume": {"dynamic-weights": {}},
}


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    module = types.ModuleType("made_scripted")
    module.Scripted = Scripted  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    common = {"num_generations": GROUP, "max_completion_length": 9, "max_steps": 3, "optim": "sgd", "seed": 7}
    common |= {"learning_rate": 0.05, "shuffle_dataset": False, "per_device_train_batch_size": ROWS // world // 2}
    common |= {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 1, "loss_type": "dapo"}

    def train(name: str, plugins: dict[str, Any], resume: str | None = None) -> None:
        with trl_ext.enable({"made_scripted:Scripted": None, **plugins}):
            output = folder / f"{name}-{world}"
            trainer = tiny_trainer("grpo", model, output, rewards=[spread, short], data=tiny_data(rows=3), **common)
            trainer.train(resume_from_checkpoint=resume)
            parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            torch.save({n: p.detach() for n, p in parameters}, folder / f"{name}-{world}-{rank}.pt")
            own = trainer._trl_ext.plugins
            (method,) = (own[plugin] for plugin in plugins)
            kept = {key: getattr(method, key) for key in method.state}
            report[name] = {**own["scripted"].seen, "metrics": metrics_of(trainer), "state": kept}

    for name, plugins in RUNS.items():
        train(name, plugins)
        train(f"{name}-resumed", plugins, str(folder / f"{name}-{world}" / "checkpoint-1"))
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
