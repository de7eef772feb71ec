"""Trains several small runs on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 processes.py MODEL FOLDER

(`accelerate launch --cpu --num_processes 2` starts one process; `multi_gpu` is accelerate's word for several.)

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


class Fixed(Plugin):
    """Completions of known content, and every value that other plugins gather."""

    name = "fixed"
    trainers = ("grpo", "rloo")
    fields = ("row", "kept")
    needs = ("column:index",)
    state = ("round",)

    def start(self) -> None:
        self.round = 0
        self.seen: dict[str, list[Any]] = {"rows": [], "advantages": [], "gathered": [], "widths": [], "lengths": []}

    @hookimpl
    def select_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.seen["rows"].append([row["index"] for row in rows])
        order = sorted(range(0, len(rows), GROUP), key=lambda start: rows[start]["index"])
        return [rows[start + i] for start in order for i in range(GROUP)]

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result = generate(prompts)
        start = trainer.process_index * len(prompts)
        ids = []
        for row in range(start, start + len(prompts)):
            length = 1 + (3 * row + self.round) % 8  # differs between rows and so between processes
            ids.append([10 + (7 * row + 5 * self.round + i * i) % 80 for i in range(length)])
        texts = [[{"role": "assistant", "content": trainer.processing_class.decode(row)}] for row in ids]
        return dataclasses.replace(result, completion_ids=ids, completions=texts)

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, torch.Tensor]:
        return {"row": torch.arange(len(rollout.rows)) + rollout.offset}

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        return {"kept": round.batch["completion_ids"].sum(1)}

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        assert torch.equal(loss.batch["kept"], loss.batch["completion_ids"].sum(1))
        return {"pull": -0.1 * (loss.per_token_logps * loss.mask).sum(1).mean()}

    @hookimpl
    def round_metrics(self, round: Any) -> dict[str, tuple[float, float]]:
        self.round += 1
        self.seen["advantages"].append(round.trainer.gather(per_row(round)).tolist())
        self.seen["gathered"].append(round.gathered["row"].tolist())
        self.seen["widths"].append(round.loss_mask.shape[1])
        self.seen["lengths"].append(round.lengths.tolist())
        round.log("logged_length", round.loss_mask.sum(1))
        round.log("logged_reward", round.total_reward)
        rank = round.trainer.process_index
        lengths = round.loss_mask.sum().item()
        return {"length": (lengths, len(round.rows)), "rank": (rank, 1), f"only_{rank}": (2.0, 1)}

    @hookimpl
    def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
        loss.log("logged_tokens", loss.mask.sum(1))
        return {"tokens": (loss.mask.sum().item(), len(loss.mask))}


class Tokens(Plugin):
    """One advantage per token, on padded widths that differ between processes."""

    name = "tokens"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        steps = torch.arange(round.loss_mask.shape[1]) % 3
        return round.advantages[round.local].unsqueeze(1) * steps


class Whole(Plugin):
    name = "whole"
    trainers = ("grpo", "rloo")
    needs = ("whole_groups",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.groups: list[list[int]] = []

    @hookimpl
    def loss_metrics(self, loss: Any) -> None:
        self.groups.append(sorted(loss.batch["trl_ext_group_ids"].tolist()))


class Asks(Plugin):
    """Generates and scores for some rows only, so that processes ask for unequal numbers and some for none."""

    name = "asks"
    trainers = ("grpo", "rloo")
    fields = ("number",)

    def start(self) -> None:
        self.answers: list[dict[str, Any]] = []

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any, context: Any) -> Any:
        for wanted in ((1, 5, 9), (0,), ()):
            where = [row for row, number in enumerate(context.row_numbers) if number in wanted]
            asked, rows = [prompts[row] for row in where], [context.rows[row] for row in where]
            greedy = generate(asked, greedy=True, rows=where)
            for row, number in zip(rows, where, strict=True):
                row["row"] = context.row_numbers[number]
            scores = trainer.score(rows, asked, greedy.completions, greedy.completion_ids)
            logps = trainer.logps(greedy.prompt_ids, greedy.completion_ids, entropy=True)
            assert logps.entropies.shape == logps.per_token_logps.shape
            values = zip(greedy.completion_ids, scores.tolist(), logps.per_token_logps.sum(1).tolist(), strict=True)
            self.answers.append(
                {str(context.row_numbers[row]): value for row, value in zip(where, values, strict=True)}
            )
        return generate(prompts)

    @hookimpl
    def batch_fields(self, round: Any) -> dict[str, torch.Tensor]:
        return {"number": torch.arange(len(round.rows)) + round.offset}

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor]:
        batch = loss.batch
        chosen = [row for row, number in enumerate(batch["number"].tolist()) if number < 3]  # of process 0
        prompts = [batch["prompt_ids"][row][batch["prompt_mask"][row] == 1].tolist() for row in chosen]
        ids = [batch["completion_ids"][row][batch["completion_mask"][row] == 1].tolist() for row in chosen]
        logps = loss.trainer.logps(prompts, ids, grad=True).per_token_logps
        return {"push": 0.1 * logps.sum() / len(batch["number"])}


def per_row(round: Any) -> torch.Tensor:
    if round.advantages.dim() == 1:
        return round.advantages[round.local]
    return (round.advantages * round.loss_mask).sum(1) / round.loss_mask.sum(1)


def spread(completion_ids: list[list[int]], row: list[Any], **kwargs: Any) -> list[float]:
    return [float(sum(ids) % 7) / 3 + 0.1 * (int(r) % 2) for ids, r in zip(completion_ids, row, strict=True)]


def short(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    return [None if len(ids) == 5 else 1.0 / len(ids) for ids in completion_ids]


def publish(cls: type) -> str:
    module = types.ModuleType(f"made_{cls.__name__.lower()}")
    module.Made = cls  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return f"{module.__name__}:Made"


RUNS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "gdpo": ("grpo", ["gdpo"], {"loss_type": "grpo", "save_strategy": "steps", "save_steps": 1}),
    "gdpo-tokens": ("grpo", [{"gdpo": {"whiten": "token"}}], {"loss_type": "dapo"}),
    "shared-prefix": ("grpo", ["gdpo", {"shared-prefix": {"min_gain": 0}}], {"loss_type": "grpo"}),
    # with the forward of shared-prefix, and rounds that are used twice
    "asks": ("grpo", [{"shared-prefix": {"min_gain": 0}}, publish(Asks)], {"loss_type": "grpo", "num_iterations": 2}),
    "token-wise": ("grpo", [publish(Tokens)], {"loss_type": "grpo"}),
    "rloo": ("rloo", [], {"beta": 0.0}),
    "thinkless": (
        "grpo",
        [{"thinkless": {"alpha": 0.5, "think": "T", "short": "S", "close": "E"}}],
        {"loss_type": "dapo", "scale_rewards": "none"},
    ),
}
WHOLE = publish(Whole)
P3O = {"p3o": {"reward_scale": "running_diff"}}
WHOLE_RUNS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "whole-grpo": ("grpo", [WHOLE], {}),
    "whole-rloo": ("rloo", [WHOLE], {}),
    # with a reference model that TRL does not load
    "p3o": (
        "grpo",
        [WHOLE, P3O],
        {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    ),
    "p3o-rloo": ("rloo", [WHOLE, "p3o"], {"beta": 0.0}),
    "trpa": (
        "grpo",
        [WHOLE, {"trpa": {"levels": [{"spread": 1.0}, {"spread": 0.4}], "tr_kl_coef": 1.0}}],
        {"num_iterations": 2, "max_steps": 4},
    ),
}


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    fixed = publish(Fixed)
    common = {"num_generations": GROUP, "max_completion_length": 8, "max_steps": 3, "optim": "sgd"}
    common |= {"learning_rate": 0.05, "seed": 7}

    def train(name: str, kind: str, plugins: list[Any], resume: str | None = None, **settings: Any) -> Any:
        with trl_ext.enable(fixed, *plugins):
            trainer = tiny_trainer(
                kind,
                model,
                folder / f"{name}-{world}",
                rewards=[spread, short],
                data=tiny_data(rows=12),
                **common | settings,
            )
            trainer.train(resume_from_checkpoint=resume)
            torch.save(
                {n: p.detach() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()},
                folder / f"{name}-{world}-{rank}.pt",
            )
            seen = trainer._trl_ext.plugins["fixed"].seen
            report[name] = {**seen, "metrics": metrics_of(trainer), "logged": list(trainer._logs["advantages"])}
            if "asks" in trainer._trl_ext.plugins:
                report[name]["answers"] = trainer._trl_ext.plugins["asks"].answers
            return trainer, trainer._trl_ext.plugins

    for name, (kind, plugins, settings) in RUNS.items():
        train(name, kind, plugins, per_device_train_batch_size=ROWS // world, **settings)
    train("resumed", "grpo", ["gdpo"], str(folder / f"gdpo-{world}" / "checkpoint-1"), loss_type="grpo",
          per_device_train_batch_size=ROWS // world)  # fmt: skip
    sizes = {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": 6 // world, "max_steps": 2}
    for name, (kind, plugins, settings) in WHOLE_RUNS.items():
        _, made = train(name, kind, plugins, **sizes | settings)
        report[name]["groups"] = made["whole"].groups
    train("p3o-resumed", "grpo", [WHOLE, P3O], str(folder / f"p3o-{world}" / "checkpoint-2"),
          **sizes | {"num_iterations": 2, "max_steps": 4})  # fmt: skip
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
