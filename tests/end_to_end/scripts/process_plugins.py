"""Plugins of `processes.py`: known completions, groups, whole steps, rows of their own, and answers that disagree."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from trl_ext_hooks import Generation, Plugin, PolicyLoss, SelectedRows, SideBatch, hookimpl

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
