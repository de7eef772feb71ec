"""Trains DPO with plugins on one or more processes and writes down what each process ended with.

ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 pairs.py MODEL GUIDE DATA FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import trl_ext
from trl_ext.testing import metrics_of, tiny_args, tiny_data, tiny_trainer

torch.set_num_threads(1)
ROWS = 8  # of a step, on all processes


def main(model: str, guide: str, data: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState
    from datasets import Dataset

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    plain = Dataset.load_from_disk(data)
    in_memory = Dataset.from_list(plain.to_list())  # each process has a cache folder of its own

    def train(name: str, plugins: dict[str, Any], data: Any = plain, resume: str | None = None) -> None:
        with trl_ext.enable(plugins):
            trainer = tiny_trainer(
                "dpo",
                model,
                folder / f"{name}-{world}",
                data=data,
                per_device_train_batch_size=ROWS // world,
                max_steps=2,
                optim="sgd",
                learning_rate=0.05,
                save_strategy="steps",
                save_steps=1,
            )
            trainer.train(resume_from_checkpoint=resume)
        weights = {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
        torch.save(weights, folder / f"{name}-{world}-{rank}.pt")
        report[name] = metrics_of(trainer)

    train("live", {"tgdpo": {"guide": guide}})
    train("ahead", {"tgdpo": {"guide": guide, "precompute": True}})
    train("memory", {"tgdpo": {"guide": guide, "precompute": True}}, in_memory)
    train("shared", {"tgdpo": {"guide": guide}, "shared-prefix": {"min_gain": 0}})
    train("resumed", {"tgdpo": {"guide": guide}}, resume=str(folder / f"live-{world}" / "checkpoint-1"))
    rounds = tiny_args(
        "dpo",
        folder / f"rounds-{world}",
        per_device_train_batch_size=4 // world,
        max_steps=1,
        optim="sgd",
        learning_rate=0.05,
    )
    options = {"reward_funcs": ["trl_ext.testing.digits"], "betas": [0.1], "rounds": 2, "max_completion_length": 8}
    trl_ext.run("apo", model=model, args=rounds, train_dataset=tiny_data("grpo", 24), apo=options | {"sample_batch": 3})
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(*sys.argv[1:4], Path(sys.argv[4]))
    torch.distributed.destroy_process_group()
