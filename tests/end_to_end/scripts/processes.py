"""Trains several small runs on one or more processes and writes down what each process saw.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 processes.py MODEL FOLDER [steps | groups]

(`accelerate launch --cpu --num_processes 2` starts one process; `multi_gpu` is accelerate's word for several.) With
`steps` or `groups` it trains only the runs of that name, and what comes with them. The folder of the repository must be
on the search path.

Completions are made from the number of the row among all processes' rows, so that the data do not depend on how many
processes share them.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

import trl_ext
from tests.end_to_end.scripts.process_plugins import (
    DISAGREE,
    GROUP,
    ROWS,
    Asks,
    Fixed,
    Formed,
    Grown,
    OneDiffers,
    Steps,
    Tokens,
    Whole,
)
from trl_ext.testing import metrics_of, tiny_data, tiny_trainer

torch.set_num_threads(1)


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
    "reg-grpo": ("grpo", [WHOLE, "reg-grpo"], {"num_iterations": 2, "max_steps": 4, "beta": 0.1}),
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
