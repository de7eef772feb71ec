"""Cost of probing a policy at its steps: GRPO steps with SPAE against plain ones, with and without the prefix tree.

Completions are really generated. They then get the end of a paragraph every few tokens, so that all have the same
number of steps to probe. The trainers take turns on one thread, and processor time is compared. The model is a random
four-layer Qwen2. Generation, probing and update all grow with a larger one.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from trl_ext_hooks import Generation, Plugin, hookimpl

from .. import api
from ..support.quiet import quiet
from ..testing import tiny_model, tiny_trainer
from .turns import step_times

WARM_UP = 1
"""Steps of every trainer that are not counted."""
STEP = 32
"""Tokens of a paragraph."""
ARMS: dict[str, dict[str, Any] | None] = {
    "plain GRPO": None,
    "answers forced, prefix tree": {"num_probes": 0, "share": "always"},
    "answers forced, every probe for itself": {"num_probes": 0, "share": "never"},
    "5 answers drawn, prefix tree": {"num_probes": 5, "share": "always"},
    "5 answers drawn, every probe for itself": {"num_probes": 5, "share": "never"},
}


class Paragraphs(Plugin):
    """Ends a paragraph every few tokens of a completion."""

    name = "paragraphs"
    trainers = ("grpo",)

    @hookimpl
    def rollout(self, prompts: list[Any], generate: Any, trainer: Any) -> Generation:
        result, end = generate(prompts), trainer.processing_class.encode(".\n\n", add_special_tokens=False)
        ids = [list(row) for row in result.completion_ids]
        for row in ids:
            for start in range(STEP - len(end), len(row) - len(end) + 1, STEP):
                row[start : start + len(end)] = end
        return dataclasses.replace(result, completion_ids=ids)


def by_place(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Returns rewards that differ inside every group, so that no group is left out."""
    return [float(row % 2) for row in range(len(completion_ids))]


def measure(
    steps: int = 6, length: int = 512, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, Any]]:
    """Measures the processor time of a training step in every arm.

    Args:
        steps: Counted training steps of each arm.
        length: Tokens of a completion.
        progress: Called with the finished and the total number of rounds.

    Returns:
        For each arm `name`, `seconds` (median step), `share` (median over rounds of the part of the step that plain
        GRPO does not have), and `token_ratio` (tokens of all probes by computed tokens, None for plain GRPO).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # idle threads that spin would count as work
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            shape: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
            model = tiny_model(f"{folder}/model", max_position_embeddings=2 * length, **shape)
            trainers = _trainers(model, folder, steps, length)
            total = steps + WARM_UP
            times = step_times(trainers, lambda rounds: progress(rounds, total), time.process_time)
    finally:
        torch.set_num_threads(threads)
    plain = times["plain GRPO"]
    rows = []
    for name, trainer in trainers.items():
        shares = [1 - base / seconds for seconds, base in zip(times[name], plain, strict=True)][WARM_UP:]
        ratios = [entry["spae/probe_token_ratio"] for entry in trainer.state.log_history if "spae/probes" in entry]
        rows.append(
            {
                "name": name,
                "seconds": statistics.median(times[name][WARM_UP:]),
                "share": statistics.median(shares),
                "token_ratio": ratios[-1] if ratios else None,
            }
        )
    return rows


def _trainers(model: str, folder: str, steps: int, length: int) -> dict[str, Any]:
    """Builds the trainer of every arm."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    trainers = {}
    for number, (name, options) in enumerate(ARMS.items()):
        trainer = tiny_trainer(
            "grpo",
            model,
            f"{folder}/{number}",
            rewards=[by_place],
            trainer={"processing_class": tokenizer},
            max_steps=steps + WARM_UP,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
        )
        plugins: dict[str, Any] = {f"{__name__}:Paragraphs": None}
        trainers[name] = api.attach(trainer, plugins if options is None else plugins | {"spae": options})
    return trainers
