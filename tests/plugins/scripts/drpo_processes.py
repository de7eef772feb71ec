"""Trains DRPO and DisCO on one or more processes and writes down the metrics and the trained model.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 drpo_processes.py MODEL FOLDER

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
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.testing import metrics_of, tiny_data, tiny_trainer
from trl_ext_hooks import Plugin, hookimpl

torch.set_num_threads(1)

ROWS, GROUP = 12, 4  # of all processes: two processes have 6 each, so the second group lies on both


class Scripted(Plugin):
    """Completions of known content, and where the groups lie."""

    name = "scripted"
    trainers = ("grpo", "rloo")

    def start(self) -> None:
        self.turn = 0
        self.groups: list[list[int]] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result, start, ids = generate(prompts), trainer.process_index * len(prompts), []
        for row in range(start, start + len(prompts)):
            length = 1 + (3 * row + self.turn) % 8  # differs between rows and so between processes
            ids.append([10 + (7 * row + 5 * self.turn + place * place) % 80 for place in range(length)])
        texts = [[{"role": "assistant", "content": trainer.tokenizer.decode(row)}] for row in ids]
        return dataclasses.replace(result, completion_ids=ids, completions=texts)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.turn += 1
        self.groups.append(round.group_ids[round.local].tolist())


def right(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if sum(ids) % 7 == 0 else float(sum(ids) % 2) for ids in completion_ids]


RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "drpo": ("grpo", {"kl_penalty": 20.0, "length_temperature": 0.5, "tau": 0.5}),
    "disco": ("rloo", {"kl_penalty": 20.0, "score": "Lratio"}),
}


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    module = types.ModuleType("made_scripted")
    module.Scripted = Scripted  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    common: dict[str, Any] = {"num_generations": GROUP, "max_completion_length": 16, "optim": "sgd", "seed": 7}
    common |= {"learning_rate": 0.3, "shuffle_dataset": False, "beta": 0.0, "num_iterations": 2, "max_steps": 4}
    # two micro-batches of a process, which groups do not fit
    common |= {"per_device_train_batch_size": ROWS // world // 2, "gradient_accumulation_steps": 2}
    for name, (kind, options) in RUNS.items():
        with trl_ext.enable("made_scripted:Scripted", name, **{name: options}):
            extra = {"processing_class": PreTrainedTokenizerFast.from_pretrained(model)}
            output = folder / f"{name}-{world}"
            data = tiny_data(rows=6)
            trainer: Any = tiny_trainer(kind, model, output, rewards=[right], data=data, trainer=extra, **common)  # type: ignore[arg-type]
            trainer.train()
            parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            torch.save({key: value.detach() for key, value in parameters}, folder / f"{name}-{world}-{rank}.pt")
            report[name] = {"metrics": metrics_of(trainer), "groups": trainer._trl_ext.plugins["scripted"].groups}
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
