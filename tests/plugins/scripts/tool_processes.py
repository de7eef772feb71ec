"""Trains with rollouts that call tools on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 tool_processes.py MODEL FOLDER

Calls and answers are made from the number of the row among all processes' rows, so that the data do not depend on how
many processes share them.
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
from trl_ext.testing import metrics_of, tiny_trainer
from trl_ext.tools import calculator
from trl_ext_hooks import Plugin, hookimpl

torch.set_num_threads(1)

ROWS, GROUP = 12, 4  # of all processes: two processes have 6 each, so the second group lies on both


def calls_of(row: int, turn: int) -> int:
    return (2 * row + 3 * turn + row // 5) % 5


def right_of(row: int, turn: int) -> bool:
    """The second prompt is solved in the first round only, with many calls, by rows on both processes."""
    return (5 * row + turn) % 3 != 0 if row // GROUP != 1 else turn == 0 and row in (5, 6)


class Scripted(Plugin):
    """Completions of known content with messages of executed calls, and everything that was made of them."""

    name = "scripted"
    trainers = ("grpo",)
    fields = ("row", "turn")

    def start(self) -> None:
        self.turn = 0
        self.seen: dict[str, list[Any]] = {"rewards": [], "advantages": [], "calls": [], "tools": [], "shares": []}

    @hookimpl
    def select_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        order = sorted(range(0, len(rows), GROUP), key=lambda start: rows[start]["index"])
        return [rows[start + i] for start in order for i in range(GROUP)]

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result = generate(prompts)
        start = trainer.process_index * len(prompts)
        ids, masks, texts = [], [], []
        for row in range(start, start + len(prompts)):
            written: list[int] = []
            mask: list[int] = []
            messages: list[dict[str, Any]] = []
            for call in range(calls_of(row, self.turn)):
                request = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "1+1"}}}
                messages.append({"role": "assistant", "content": "", "tool_calls": [request]})
                messages.append({"role": "tool", "name": "calculator", "content": "2"})
                written += [10 + (7 * row + 5 * self.turn + call) % 80, 11, 12 + call]
                mask += [1, 0, 0]
            length = 1 + (3 * row + self.turn) % 5
            written += [10 + (3 * row + i * i) % 80 for i in range(length)]
            mask += [1] * length
            ids.append(written)
            masks.append(mask)
            texts.append(
                [*messages, {"role": "assistant", "content": trainer.processing_class.decode(written[-length:])}]
            )
        return dataclasses.replace(result, completion_ids=ids, completions=texts, tool_mask=masks)

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, Any]:
        rows = torch.arange(len(rollout.rows)) + rollout.offset
        return {"row": rows, "turn": torch.full_like(rows, self.turn)}

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.turn += 1
        self.seen["rewards"].append(round.rewards.tolist())
        self.seen["advantages"].append(round.advantages.tolist())
        self.seen["calls"].append(round.trainer.gather(round.tool_calls).tolist())
        for name, key in (("hdpo_tool_advantages", "tools"), ("hdpo_tool_share", "shares")):
            value = round.batch.get(name)
            if value is not None:
                self.seen[key].append((value if value.dim() == 0 else round.trainer.gather(value)).tolist())

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn}

    @hookimpl
    def load_state_dict(self, state: Any) -> None:
        self.turn = state["turn"]


def right(row: list[Any], turn: list[Any], **kwargs: Any) -> list[float]:
    return [float(right_of(int(r), int(t))) for r, t in zip(row, turn, strict=True)]


def form(row: list[Any], **kwargs: Any) -> list[float]:
    return [float(int(r) % 3 > 0) for r in row]


def publish(cls: type) -> str:
    module = types.ModuleType(f"made_{cls.__name__.lower()}")
    module.Made = cls  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return f"{module.__name__}:Made"


RUNS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "otc": ([{"otc": {"id_column": "task"}}], {"loss_type": "grpo", "save_strategy": "steps", "save_steps": 1}),
    "hdpo": (["hdpo"], {"loss_type": "dapo", "save_strategy": "steps", "save_steps": 1}),
    "hdpo-rows": (["hdpo"], {"loss_type": "grpo"}),
    "hdpo-otc": ([{"otc": {"id_column": "task"}}, {"hdpo": {"format_reward": "form"}}], {"loss_type": "dr_grpo"}),
}


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState
    from datasets import Dataset

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    scripted = publish(Scripted)
    # the first and the last row are one task
    prompts = [[{"role": "user", "content": text}] for text in ("1+1=", "2+2=", "1+1=")]
    data = Dataset.from_dict({"prompt": prompts, "index": [0, 1, 2], "task": ["a", "b", "a"]})
    common = {"num_generations": GROUP, "max_completion_length": 8, "max_steps": 3, "optim": "sgd"}
    common |= {"learning_rate": 0.05, "seed": 7, "max_tool_calling_iterations": 4}

    def train(name: str, plugins: list[Any], resume: str | None = None, **settings: Any) -> None:
        with trl_ext.enable(scripted, *plugins):
            trainer = tiny_trainer(
                "grpo",
                model,
                folder / f"{name}-{world}",
                rewards=[right, form],
                data=data,
                trainer={"tools": [calculator]},
                per_device_train_batch_size=ROWS // world,
                **common | settings,
            )
            trainer.train(resume_from_checkpoint=resume)
            torch.save(
                {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()},
                folder / f"{name}-{world}-{rank}.pt",
            )
            made = trainer._trl_ext.plugins
            report[name] = {**made["scripted"].seen, "metrics": metrics_of(trainer)}
            if "otc" in made:
                memory = made["otc"].memory
                keys = sorted(memory.state_dict()["keys"].tolist())
                report[name]["memory"] = {str(key): memory.get(key) for key in keys}

    for name, (plugins, settings) in RUNS.items():
        train(name, plugins, **settings)
        if "save_steps" in settings:
            again = {key: value for key, value in settings.items() if not key.startswith("save")}
            train(f"{name}-resumed", plugins, str(folder / f"{name}-{world}" / "checkpoint-1"), **again)
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
