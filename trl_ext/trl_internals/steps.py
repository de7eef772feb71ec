"""Steps of a training: how many rows of the data one takes, and whether there were any."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_ext_hooks import TrainerKind

from ..errors import CompatError, ConfigError, counted
from . import seams


def check_rows(
    kind: TrainerKind, args: Any, data: Any, cls: type[Any] | None = None, prompts: int | None = None
) -> None:
    """Refuses data that are too few for a single step. TRL would end after none and call that a success.

    Args:
        kind: The trainer.
        args: TRL's arguments.
        data: The training data. A stream has no length, and `StepsCheck` looks at the end of its training.
        cls: The class of the trainer, TRL's own by default. One that reads the data in its own way is not checked.
        prompts: How many prompts a round has, where a plugin says so.

    Raises:
        ConfigError: With the settings that make a round as large as it is.
    """
    own = seams.trainer_class(kind)
    readers = ("_get_train_sampler", "get_train_dataloader")
    if cls is not None and any(getattr(cls, name) is not getattr(own, name) for name in readers):
        return
    try:
        rows = len(data)
    except TypeError:
        return
    needed = prompts or rows_of_a_round(kind, args)
    if rows >= needed:
        return
    if needed == 1:
        raise ConfigError("the training data has no rows.")
    processes = counted(args.world_size, "process", "processes")
    factors = f"per_device_train_batch_size={args.per_device_train_batch_size}, {processes}"
    if kind == "dpo":
        raise ConfigError(
            f"the training data has {counted(rows, 'row')}, and with dataloader_drop_last=True a step takes "
            f"{needed} ({factors}), so nothing would be trained. Add rows, set dataloader_drop_last=False, or lower "
            f"the batch size."
        )
    if prompts:
        raise ConfigError(
            f"the training data has {rows} prompts, and a round takes {needed}, as a plugin asks. So nothing would be "
            f"trained. Add prompts, or let the plugin ask for fewer."
        )
    raise ConfigError(
        f"the training data has {counted(rows, 'prompt')}, and a round takes {needed}: "
        f"{args.generation_batch_size} completions, {args.num_generations} per prompt. So nothing would be "
        f"trained. Add prompts, or lower one of the factors of these completions: {factors}, and "
        f"steps_per_generation={args.steps_per_generation}, which is gradient_accumulation_steps by default."
    )


def rows_of_a_round(kind: TrainerKind, args: Any) -> int:
    """Returns how many rows of the data must be there for the first step."""
    if kind != "dpo":
        return int(args.generation_batch_size) // int(args.num_generations)
    return int(args.train_batch_size) * int(args.world_size) if args.dataloader_drop_last else 1


def planned_steps(kind: TrainerKind, args: Any, rows: int | None) -> int:
    """Returns how many steps a run will have, as its reward functions see it in the trainer's state.

    Args:
        kind: GRPO or RLOO.
        args: TRL's arguments.
        rows: How many rows the training data has. None for a stream, which needs `max_steps`.
    """
    if args.max_steps > 0 or rows is None:
        return max(1, int(args.max_steps))
    batches = rows // rows_of_a_round(kind, args) * args.num_iterations * args.steps_per_generation
    return math.ceil(args.num_train_epochs * max(1, batches // args.gradient_accumulation_steps))


def ends_round(kind: TrainerKind, args: Any, steps: int) -> bool:
    """Returns whether so many optimizer steps since the run began end a round, after which a resume changes no number.

    Args:
        kind: The trainer. DPO has no rounds.
        args: TRL's arguments.
        steps: The number of optimizer steps.
    """
    if kind == "dpo":
        return True
    micro_batches = int(args.num_iterations) * int(args.steps_per_generation)
    return steps * int(args.gradient_accumulation_steps) % micro_batches == 0


def batches_of_step(trainer: Any, first: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the micro-batches of the optimizer step under way, which wait in the trainer's buffer.

    Args:
        trainer: GRPO or RLOO in training.
        first: The first micro-batch of the step.

    Raises:
        CompatError: The trainer does not take its micro-batches from TRL's buffer.
    """
    waiting, now = trainer._buffered_inputs, trainer._step
    size = int(trainer.args.steps_per_generation)
    batches = [waiting[(now + ahead) % size] for ahead in range(micro_batches_of_step(trainer))] if waiting else []
    if not batches or batches[0]["completion_ids"] is not first["completion_ids"]:
        raise CompatError(
            f"{type(trainer).__name__} computes a loss of rows that are not the next ones in TRL's buffer of a round. "
            f"The micro-batches of an optimizer step are then not known before its losses. Use TRL's own class, or "
            f"leave out the plugin with the hook 'step_statistics'."
        )
    return batches


def micro_batches_of_step(trainer: Any) -> int:
    """Counts the micro-batches of the optimizer step under way, on this process."""
    return int(trainer.current_gradient_accumulation_steps)


def total_steps(kind: TrainerKind, trainer: Any) -> int | None:
    """Returns how many optimizer steps the training of a trainer has. None where only its begin will tell."""
    args = trainer.args
    if trainer.state.max_steps > 0:
        return int(trainer.state.max_steps)
    if args.max_steps > 0:
        return int(args.max_steps)
    return None if kind == "dpo" else planned_steps(kind, args, len(trainer.train_dataset))


class StepsCheck(TrainerCallback):
    """Refuses to call a training without a step a success."""

    def __init__(self) -> None:
        self._first = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._first = state.global_step

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step > self._first:
            return
        if state.global_step >= state.max_steps:
            warnings.warn(
                f"trl_ext: nothing was trained, since this run has {counted(state.max_steps, 'step')} and began after "
                f"step {state.global_step}.",
                stacklevel=2,
            )
            return
        raise ConfigError(
            f"training ended after step {state.global_step} of {state.max_steps} without training anything: the data "
            f"gave no batch, or a callback stopped it. Data need as many rows as a step takes; GRPO and RLOO take "
            f"generation_batch_size / num_generations prompts."
        )
