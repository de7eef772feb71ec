"""Trains DECS and SPAE on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 credit_processes.py MODEL FOLDER

Completions are made from the number of the row among all processes' rows, so that the data do not depend on how many
processes share them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import trl_ext
from trl_ext.testing import metrics_of, tiny_data, tiny_trainer
from trl_ext_hooks import Plugin, hookimpl
from trl_ext_hooks.toolkit.judges import JudgeError, Question

torch.set_num_threads(1)

ROWS, GROUP = 12, 4  # of all processes: two processes have 6 each, so the second group lies on both
RIGHT = ["a.\n\nit\n{a}\nb Wait, c\nd.\n\ne</think>{a}", "go\n{a}.\n\nx.\n\ny</think>{a}", "h\ni {a}</think>{a}"]
WRONG = ["a.\n\nb\nc Wait, d.\n\ne</think>no", "no"]


def line(row: int, turn: int) -> str:
    """One prompt a round is always answered right, the others now and then; lengths differ between rows."""
    right = row // GROUP == turn % 3 or (row + turn) % 2 == 0
    return RIGHT[(row + turn) % 3] + "." * (row % 5) if right else WRONG[row % 2]


class Scripted(Plugin):
    """Completions of known content, and what was made of them."""

    name = "scripted"
    trainers = ("grpo",)

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.turn = 0
        self.seen: dict[str, list[Any]] = {"rewards": [], "advantages": [], "kept": [], "items": [], "widths": []}

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Any:
        result, tokenizer = generate(prompts), trainer.processing_class
        texts = []
        for row, prompt in enumerate(prompts, trainer.process_index * len(prompts)):
            answer = 2 * int(prompt[-1]["content"].partition("+")[0])
            texts.append(line(row, self.turn).format(a=answer))
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        said = [[{"role": "assistant", "content": text}] for text in texts]
        return dataclasses.replace(result, completion_ids=ids, completions=said)

    @hookimpl
    def round_metrics(self, round: Any) -> None:
        self.turn += 1
        places = torch.arange(1, round.loss_mask.shape[1] + 1)
        rows = torch.stack([round.advantages.sum(1), (round.advantages * places).sum(1)], dim=1)
        self.seen["rewards"].append(round.rewards.tolist())
        self.seen["advantages"].append(round.trainer.gather(rows).tolist())
        self.seen["kept"].append(round.trainer.gather(round.loss_mask.sum(1)).tolist())
        self.seen["items"].append(int(round.batch["num_items_in_batch"]))
        self.seen["widths"].append(round.loss_mask.shape[1])

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {"turn": self.turn}

    @hookimpl
    def load_state_dict(self, state: Any) -> None:
        self.turn = state["turn"]


def right(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    texts = [message[0]["content"].rpartition("</think>")[2].rstrip(".") for message in completions]
    return [float(text == str(a)) for text, a in zip(texts, answer, strict=True)]


def fails_on_the_second(questions: Sequence[Question]) -> list[bool | None]:
    from accelerate import PartialState

    if PartialState().process_index == 1:
        raise OSError("this process cannot reach the judge")
    return [True for _ in questions]


def publish(name: str, value: Any) -> str:
    module = types.ModuleType(f"made_{name.lower()}")
    setattr(module, name, value)
    sys.modules[module.__name__] = module
    return f"{module.__name__}:{name}"


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "decs": ({"decs": {"kappa_init": 0.35, "kappa_lr": 0.1}}, {"loss_type": "dapo"}),
    "decs-rows": ({"decs": {"kappa_init": 0.35}}, {"loss_type": "grpo"}),
    "spae": ({"spae": {"num_probes": 2, "max_probe_tokens": 3}}, {"loss_type": "dapo"}),
    "spae-rows": ({"spae": {"num_probes": 0}}, {"loss_type": "dr_grpo"}),
}


def main(model: str, folder: Path) -> dict[str, Any]:
    from accelerate import PartialState

    state = PartialState(cpu=True)
    world, rank = state.num_processes, state.process_index
    report: dict[str, Any] = {"world": world}
    scripted = publish("Scripted", Scripted)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    common = {"num_generations": GROUP, "max_completion_length": 64, "max_steps": 3, "optim": "sgd", "seed": 7}
    common |= {"learning_rate": 0.05, "shuffle_dataset": False, "per_device_train_batch_size": ROWS // world}

    def build(name: str, **settings: Any) -> Any:
        data, extra = tiny_data(rows=3), {"processing_class": tokenizer}
        output = folder / f"{name}-{world}"
        return tiny_trainer("grpo", model, output, rewards=[right], data=data, trainer=extra, **common | settings)

    def train(name: str, plugins: dict[str, Any], resume: str | None = None, **settings: Any) -> None:
        with trl_ext.enable({scripted: None, **plugins}):
            trainer = build(name, **settings)
            trainer.train(resume_from_checkpoint=resume)
            parameters = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
            torch.save({n: p.detach() for n, p in parameters}, folder / f"{name}-{world}-{rank}.pt")
            own = trainer._trl_ext.plugins
            report[name] = {**own["scripted"].seen, "metrics": metrics_of(trainer)}
            if "decs" in own:
                report[name]["state"] = {key: getattr(own["decs"], key) for key in own["decs"].state}

    for name, (plugins, settings) in RUNS.items():
        train(name, plugins, save_strategy="steps", save_steps=1, **settings)
    for name in ("decs", "spae"):
        plugins, settings = RUNS[name]
        train(f"{name}-resumed", plugins, str(folder / f"{name}-{world}" / "checkpoint-1"), **settings)
    with trl_ext.enable({scripted: None, "decs": {"judge": publish("judge", fails_on_the_second)}}):
        trainer = build("failing", max_steps=1)
        try:
            trainer.train()
            report["failing"] = None
        except (OSError, JudgeError) as error:  # each process must get here, none may wait for the other
            report["failing"] = f"{type(error).__name__}: {error}"
    (folder / f"report-{world}-{rank}.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
