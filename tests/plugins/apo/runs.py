"""Runs of APO on the tiny model, their reward functions and judge, and what lies in their folders."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import trl_ext
from trl_ext.testing import tiny_args, tiny_data


def many_digits(completions: list[Any], **columns: Any) -> list[float]:
    """More digits and different letters, so that samples seldom tie."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(t.isdigit() for t in text) + 0.01 * len(set(text)) for text in texts]


class Longer:
    """A judge: the longer one is better."""

    def judge(self, prompts: list[Any], pairs: list[list[Any]]) -> list[int]:
        lengths = [[len(c[0]["content"]) for c in pair] for pair in pairs]
        return [-1 if a == b else int(b > a) for a, b in lengths]


def functions() -> types.ModuleType:
    """The module `apo_rewards`, which options name."""
    module: Any = types.ModuleType("apo_rewards")
    module.many_digits, module.Longer = many_digits, Longer
    module.same = lambda completions, **columns: [1.0] * len(completions)
    module.none = lambda completions, **columns: [None] * len(completions)
    return module


OPTIONS = {
    "reward_funcs": ["apo_rewards.many_digits"],
    "betas": [0.1],
    "rounds": 3,
    "num_samples": 4,
    "sample_batch": 2,
    "max_completion_length": 6,
    "temperature": 1.0,
    "top_p": 1.0,
}


def go(
    model: str, folder: Path, options: dict[str, Any] | None = None, plugins: tuple[Any, ...] = (), **settings: Any
) -> Path:
    """A run of rounds on the tiny model; returns its folder."""
    arguments = {name: settings.pop(name) for name in ("peft_config", "train_dataset") if name in settings}
    arguments.setdefault("train_dataset", tiny_data("grpo", 12))
    args = tiny_args("dpo", folder, **{"learning_rate": 1e-3, "per_device_train_batch_size": 2, **settings})
    trl_ext.run("apo", *plugins, model=model, args=args, **arguments, apo=OPTIONS | (options or {}))
    return folder


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def pairs_of(folder: Path, number: int) -> list[dict[str, Any]]:
    lines = (folder / f"round-{number}" / "pairs" / "pairs.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
