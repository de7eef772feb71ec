"""Trains VL-DAC on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 vl_dac_processes.py MODEL FOLDER

Episodes are made from the number of the row among all processes' rows and from the round, so that they do not depend on
how many processes share them. They have 0 to 4 steps, on the second of two processes at most 3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import trl_ext
from trl_ext.testing import calls, metrics_of, tiny_trainer

torch.set_num_threads(1)

ROWS = 12


def episode(row: int, turn: int) -> dict[str, Any]:
    """Row 7 says nothing, row 2 is cut, and a reward of row 4 is no number in the second round."""
    steps = 0 if row == 7 else 1 + (5 * row + 3 * turn) % (4 if row < 6 else 3)
    ids, mask = [30 + row], [0]
    for step in range(steps):
        length = 1 + (row + 2 * step + turn) % 3
        ids += [10 + (11 * row + 7 * step + 5 * turn + i * i) % 80 for i in range(length)] + [40 + step]
        mask += [1] * length + [0]
    rewards = [((3 * row + 5 * step + turn) % 7) / 3 - 1 for step in range(steps)]
    if row == 4 and turn == 1:
        rewards[0] = float("nan")
    done = row % 3 > 0
    return {
        "prompt_ids": [20 + row % 5, 21],
        "completion_ids": ids,
        "env_mask": mask,
        "step_rewards": rewards,
        "done": done,
        "truncated": row == 2,
        "logprobs": None,
    }


def rollouts(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    start = trainer.accelerator.process_index * len(prompts)
    turn = trainer.state.global_step // trainer.num_iterations
    rows = [episode(row, turn) for row in range(start, start + len(prompts))]
    return {name: [row[name] for row in rows] for name in rows[0]} | {"logprobs": None}


def nothing(prompts: list[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(prompts)


class Counter:
    """An environment whose episodes differ in length from row to row, and so between processes."""

    made = 0

    def __init__(self) -> None:
        self.number, Counter.made = Counter.made, Counter.made + 1
        self.total_reward, self.done = 0.0, False

    def reset(self, **row: Any) -> str:
        self.total_reward, self.done = 0.0, False
        return str(self.number)

    def step(self) -> str:
        """
        Goes on.

        Returns:
            How far
        """
        self.total_reward += 1.0
        self.done = self.total_reward > self.number
        return str(self.total_reward)


COMMON = {"num_generations": 4, "max_completion_length": 60, "optim": "sgd", "learning_rate": 0.05, "seed": 7}
COMMON |= {"num_iterations": 2, "max_steps": 6, "data_seed": 3}
OPTIONS = {"head_sizes": [8], "value_warmup_iterations": 1, "value_lr": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"save_strategy": "steps", "save_steps": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "max_steps": 4},
}


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}

    def train(name: str, resume: str | None = None, **settings: Any) -> None:
        with trl_ext.enable({"vl-dac": OPTIONS}):
            trainer = tiny_trainer("grpo", model, folder / f"{name}-{world}", rewards=[nothing], **COMMON | settings)
            trainer.train(resume_from_checkpoint=resume)
            method = trainer._trl_ext.plugins["vl-dac"]
            policy = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            weights = {n: p.detach() for n, p in policy}
            critic = method.critic.state_dict()
            torch.save({"policy": weights, "critic": critic}, folder / f"{name}-{world}-{rank}.pt")
            report[name] = {"metrics": metrics_of(trainer), "steps": method.scored.episodes.counts.tolist()}

    for name, settings in RUNS.items():
        size = ROWS // world // settings.get("gradient_accumulation_steps", 1)
        own = {"per_device_train_batch_size": size, "trainer": {"rollout_func": rollouts}}
        train(name, **own | settings)
        if name == "whole":
            train("resumed", str(folder / f"{name}-{world}" / "checkpoint-2"), **own)
    sampled = calls(model, "step", likelihood=5.0)
    environment = {
        "trainer": {"environment_factory": Counter},
        "generation_kwargs": sampled,
        "max_completion_length": 150,
    }
    train("environment", per_device_train_batch_size=4, max_steps=4, max_tool_calling_iterations=4, **environment)
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
