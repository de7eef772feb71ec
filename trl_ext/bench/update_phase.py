"""Update phase of GRPO in the real trainer, with and without the shared-prefix plugin.

A plugin gives both trainers the same completions of an exact length, so that a step is loss, backward and optimizer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from trl_ext_hooks import Generation, Plugin, hookimpl

from .. import api
from ..support.quiet import quiet
from ..testing import tiny_data, tiny_model, tiny_trainer
from .shared_prefix import Shape, default_model
from .turns import step_times


class FixedRollout(Plugin):
    """Replaces generation by random prompts and completions of fixed lengths."""

    name = "fixed-rollout"
    trainers = ("grpo",)
    prompt, completion, vocabulary = 0, 0, 0

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any) -> Generation:
        generator = torch.Generator().manual_seed(len(prompts))
        shared = torch.randint(8, self.vocabulary, (self.prompt,), generator=generator).tolist()
        texts = torch.randint(8, self.vocabulary, (len(prompts), self.completion), generator=generator).tolist()
        replies = [[{"role": "assistant", "content": ""}] for _ in prompts]
        extra: dict[str, Any] = {"extra_fields": {}, "images": None, "tool_images": None}
        return Generation([list(shared) for _ in prompts], texts, replies, extra=extra)


def measure(shape: Shape, steps: int = 3, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Measures the median step of both trainers on the default model, with one group per step.

    Args:
        shape: Prompt tokens, group size and completion tokens.
        steps: Counted steps.
        progress: Called with the number of finished rounds.

    Returns:
        `seconds_dense`, `seconds_shared` and `speedup`.
    """
    FixedRollout.prompt, group, FixedRollout.completion = shape
    FixedRollout.vocabulary = 96
    settings: dict[str, Any] = {
        "per_device_train_batch_size": group,
        "num_generations": group,
        "max_completion_length": FixedRollout.completion,
        "gradient_checkpointing": False,
        "logging_steps": 1000,
        "max_steps": steps + 1,
        "learning_rate": 1e-6,
    }
    rollout = f"{__name__}:FixedRollout"
    with tempfile.TemporaryDirectory() as folder, quiet():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model(f"{folder}/model"))
        trainers: dict[str, Any] = {}
        for name, plugins in {"dense": (rollout,), "shared": (rollout, "shared-prefix")}.items():
            model: Any = default_model()
            trainer = tiny_trainer(
                "grpo",
                model,
                f"{folder}/{name}",
                rewards=[_noise],
                data=tiny_data("grpo"),
                trainer={"processing_class": tokenizer},
                **settings,
            )
            trainers[name] = api.attach(trainer, *plugins)
        times = step_times(trainers, progress)
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "seconds_dense": median["dense"],
        "seconds_shared": median["shared"],
        "speedup": median["dense"] / median["shared"],
    }


def _noise(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(row % 3) for row in range(len(completions))]
