"""Trains several small runs on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 processes.py MODEL FOLDER [steps]

(`accelerate launch --cpu --num_processes 2` starts one process; `multi_gpu` is accelerate's word for several.) With
`steps` it trains only the run of that name, and what comes with it.

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
from trl_ext_hooks import Generation, Plugin, PolicyLoss, SelectedRows, SideBatch, hookimpl

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
        real = round.group_ids >= 0
        self.seen["advantages"].append(round.trainer.gather(per_row(round))[real].tolist())
        self.seen["gathered"].append(round.gathered["row"][real].tolist())
        self.seen["widths"].append(round.loss_mask.shape[1])
        self.seen["lengths"].append(round.lengths[real].tolist())
        round.log("logged_length", round.loss_mask.sum(1)[real[round.local]])
        round.log("logged_reward", round.total_reward)
        rank = round.trainer.process_index
        lengths = round.loss_mask.sum().item()
        return {"length": (lengths, real[round.local].sum().item()), "rank": (rank, 1), f"only_{rank}": (2.0, 1)}

    @hookimpl
    def loss_metrics(self, loss: Any) -> dict[str, tuple[float, float]]:
        lengths = loss.mask.sum(1)[loss.mask.any(1)]  # without rows that are left out
        loss.log("logged_tokens", lengths)
        return {"tokens": (lengths.sum().item(), len(lengths))}


class Tokens(Plugin):
    """One advantage per token, on padded widths that differ between processes."""

    name = "tokens"
    trainers = ("grpo",)

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        steps = torch.arange(round.loss_mask.shape[1]) % 3
        return round.advantages[round.local].unsqueeze(1) * steps


class Formed(Fixed):
    """Groups of 2, 5 and 5 rows, for three of six prompts that are drawn for a round."""

    claims = ("groups",)
    needs = ("column:index", "prompts:6")

    @hookimpl
    def select_rows(self, rows: list[dict[str, Any]], group_ids: list[int]) -> SelectedRows:
        prompts = list({group: row for group, row in zip(group_ids, rows, strict=True)}.values())
        assert len(prompts) == 6 and len({row["index"] for row in prompts}) == 6
        self.seen["rows"].append([row["index"] for row in rows])
        return SelectedRows.repeated(sorted(prompts, key=lambda row: row["index"])[:3], [2, 5, 5])


class Grown(Fixed):
    """One to three rows for each prompt, so that processes have different numbers of them."""

    claims = ("groups",)

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Generation:
        result = generate(prompts)
        start = trainer.process_index * len(prompts)
        turns = [(row, turn) for row in range(len(prompts)) for turn in range(1 + (start + row) // 5)]
        tags = [3 * (start + row) + turn for row, turn in turns]
        ids = [
            [10 + (7 * tag + 5 * self.round + i * i) % 80 for i in range(1 + (tag + self.round) % 8)] for tag in tags
        ]
        return Generation(
            [result.prompt_ids[row] for row, _ in turns],
            ids,
            [[{"role": "assistant", "content": trainer.processing_class.decode(row)}] for row in ids],
            source=[row for row, _ in turns],
            fields={"row": torch.tensor(tags)},
        )

    @hookimpl
    def annotate(self, rollout: Any) -> None:
        """Adds nothing, because the rollout did."""

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, PolicyLoss]:
        return {"pull": PolicyLoss(-0.1 * loss.per_token_logps)}


class OneDiffers(Plugin):
    """Goes wrong on the last process only."""

    name = "one-differs"
    trainers = ("grpo",)
    fields = ("row",)
    where: str

    def wrong(self, hook: str, trainer: Any) -> bool:
        return self.where.startswith(hook) and trainer.process_index == trainer.num_processes - 1 > 0

    @hookimpl
    def select_rows(self, rows: list[dict[str, Any]], trainer: Any) -> Any:
        if not self.wrong("select", trainer):
            return rows
        if self.where == "select-raises":
            raise ZeroDivisionError("by nothing")
        return 3 if self.where == "select-type" else rows[GROUP:] + rows[:GROUP]

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result = generate(prompts)
        return dataclasses.replace(result, completions=[]) if self.wrong("rollout", trainer) else result

    @hookimpl
    def annotate(self, rollout: Any) -> dict[str, torch.Tensor]:
        return {"row": torch.arange(len(rollout.rows)) + rollout.offset}

    @hookimpl
    def rewards(self, scored: Any) -> torch.Tensor:
        return scored.rewards + 0.25 * self.wrong("rewards", scored.trainer)


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


class Steps(Plugin):
    """A constraint on the whole step, rows of its own, of which some processes have none, and a mask of tokens."""

    name = "steps"
    trainers = ("grpo",)
    needs = ("old_logps", "old_entropies")

    @hookimpl
    def token_mask(self, round: Any) -> torch.Tensor:
        entropies, counted = round.old_entropies, round.loss_mask != 0
        everything = torch.tensor(round.trainer.gather_objects(entropies[counted].tolist()))
        keep = (entropies >= everything.median()) | (counted.cumsum(1) == 1)
        rows = torch.arange(len(keep)) + round.offset
        return keep & (rows != 7).unsqueeze(1)

    @hookimpl
    def side_batch(self, trainer: Any, step: int) -> SideBatch | None:
        rows = list(range(5))
        if step % 2:
            rows = rows[trainer.process_index :: trainer.num_processes]
        elif trainer.process_index:
            return None
        prompts, completions = [[30 + row] * (row + 1) for row in rows], [[40 + row] * (6 - row) for row in rows]
        return SideBatch(prompts, completions, {"weight": torch.tensor(rows) / 4})

    @hookimpl
    def step_statistics(self, step: Any) -> float:
        kl = step.token_mean(lambda loss: loss.old_per_token_logps - loss.per_token_logps).item()
        step.log("kl", kl)
        return kl

    @hookimpl
    def loss_terms(self, loss: Any) -> dict[str, torch.Tensor | PolicyLoss]:
        side = loss.side[self.name]
        drift = loss.old_per_token_logps - loss.per_token_logps
        values = -side.per_token_logps * side.fields["weight"].unsqueeze(1)
        return {
            "side": side.token_mean(values),
            "trust": PolicyLoss(10 * max(loss.step_statistics[self.name], 0) * drift),
        }


class Disagrees(Plugin):
    """Answers a hook on the last process in another way than on the others."""

    trainers = ("grpo",)

    def answer(self, trainer: Any, right: Any, wrong: Any) -> Any:
        return wrong if trainer.process_index == trainer.num_processes - 1 else right


class OtherAdvantages(Disagrees):
    name = "other-advantages"

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return self.answer(round.trainer, round.advantages, round.advantages + 1)


class OtherShape(Disagrees):
    name = "other-shape"

    @hookimpl
    def advantages(self, round: Any) -> torch.Tensor:
        return self.answer(round.trainer, round.advantages, round.token_advantages)


class OtherRows(Disagrees):
    name = "other-rows"

    @hookimpl
    def keep_rows(self, round: Any) -> torch.Tensor:
        all_of_them = torch.ones(len(round.group_ids), dtype=torch.bool)
        return self.answer(round.trainer, all_of_them, ~all_of_them)


class NoMask(Disagrees):
    name = "no-mask"

    @hookimpl
    def token_mask(self, round: Any) -> Any:
        return self.answer(round.trainer, None, [True])


class OtherFields(Disagrees):
    name = "other-fields"

    @hookimpl
    def side_batch(self, trainer: Any) -> Any:
        return SideBatch([[1]], [[2]], self.answer(trainer, {"here": torch.zeros(1)}, {}))

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        return None


class NoRows(Disagrees):
    name = "no-rows"

    @hookimpl
    def side_batch(self, trainer: Any) -> Any:
        return self.answer(trainer, None, SideBatch([[1]], [[]]))

    @hookimpl
    def loss_terms(self, loss: Any) -> None:
        return None


DISAGREE = (OtherAdvantages, OtherShape, OtherRows, NoMask, OtherFields, NoRows)


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
FAILURES = ("select-differs", "select-type", "select-raises", "rollout-short", "rewards-differ")
STEPS = publish(Steps)
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


def main(model: str, folder: Path, only: str = "") -> dict[str, Any]:
    """Trains the runs.

    Args:
        model: Folder of the model.
        folder: Where to write.
        only: `steps` for the runs with hooks of whole steps, `groups` for those in which plugins form groups and more
            of them, or nothing for all but these.
    """
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    fixed = publish(Fixed)
    common = {"num_generations": GROUP, "max_completion_length": 8, "max_steps": 3, "optim": "sgd"}
    common |= {"learning_rate": 0.05, "seed": 7}

    def train(
        name: str, kind: str, plugins: list[Any], resume: str | None = None, first: str = fixed, **settings: Any
    ) -> Any:
        with trl_ext.enable(first, *plugins):
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
            if "eval_dataset" in settings.get("trainer", {}):
                trainer.evaluate()
            seen = getattr(next(iter(trainer._trl_ext.plugins.values())), "seen", {})
            report[name] = {**seen, "metrics": metrics_of(trainer), "logged": list(trainer._logs["advantages"])}
            if "asks" in trainer._trl_ext.plugins:
                report[name]["answers"] = trainer._trl_ext.plugins["asks"].answers
            return trainer, trainer._trl_ext.plugins

    if only != "groups":
        steps = {"per_device_train_batch_size": ROWS // world // 2, "gradient_accumulation_steps": 2}
        steps |= {"num_iterations": 2, "max_steps": 4}
        steps |= {"num_generations_eval": 2, "per_device_eval_batch_size": ROWS // world}
        shared = [STEPS, {"shared-prefix": {"min_gain": 0}}]
        train("steps", "grpo", [STEPS], **steps, save_strategy="steps", save_steps=2,
              trainer={"eval_dataset": tiny_data(rows=6)})  # fmt: skip
        train("steps-resumed", "grpo", [STEPS], str(folder / f"steps-{world}" / "checkpoint-2"), **steps)
        train("steps-shared", "grpo", shared, **steps)
        report["errors"] = {}
        for cls in DISAGREE if world > 1 else ():
            with trl_ext.enable(publish(cls)):
                trainer = tiny_trainer("grpo", model, folder / "wrong", **common, per_device_train_batch_size=4)
                try:
                    trainer.train()
                except trl_ext.PluginError as error:
                    report["errors"][cls.name] = str(error)
    if not only:
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
    if only != "steps":
        formed, grown = publish(Formed), publish(Grown)
        size = {"per_device_train_batch_size": ROWS // world, "loss_type": "grpo"}
        packed = ["gdpo", {"shared-prefix": {"min_gain": 0}}]
        train("formed", "grpo", packed, first=formed, **size | {"save_strategy": "steps", "save_steps": 1})
        train("formed-resumed", "grpo", packed, str(folder / f"formed-{world}" / "checkpoint-1"), first=formed, **size)
        train("grown", "grpo", [], first=grown, **size | {"num_iterations": 2, "beta": 0.1})
        for where in FAILURES:
            OneDiffers.where = where
            try:
                train(where, "grpo", [], first=publish(OneDiffers), **size)
            except Exception as error:
                report[where] = f"{type(error).__name__}: {error}"
    if only == "groups":
        sliced = {"per_device_train_batch_size": 6 // world, "gradient_accumulation_steps": 2}
        train("formed-rloo", "rloo", [], first=formed, beta=0.1, per_device_train_batch_size=ROWS // world)
        train("grown-dapo", "grpo", ["gdpo"], first=grown, **sliced | {"loss_type": "dapo"})
        train("grown-rloo", "rloo", [], first=grown, beta=0.1, per_device_train_batch_size=ROWS // world)
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    torch.distributed.destroy_process_group()
