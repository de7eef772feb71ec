"""Sizes of a run and the memory that it takes, from settings and a model's configuration, without its weights."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from trl_ext_hooks import TrainerKind

from ..errors import counted
from ..trl_internals import distribution, steps
from ..trl_internals.arguments import Parsed

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_anyprecision")
"""Optimizers that keep two numbers of a parameter's own precision for each parameter."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a model.

    Attributes:
        total: All of them, those of an adapter included.
        trained: Those that training changes.
        adapter: Those of an adapter, 0 without one.
        dtype: The precision in which they are loaded.
    """

    total: int
    trained: int
    adapter: int
    dtype: str


def round_sizes(kind: TrainerKind, args: Any, rows: int | None) -> list[tuple[str, str]]:
    """Returns what a round and the run consist of, with labels, for a planned number of processes.

    Args:
        kind: The trainer.
        args: TRL's arguments.
        rows: The number of rows for training, None for a stream.
    """
    batch, accumulated, processes = args.train_batch_size, args.gradient_accumulation_steps, args.world_size
    micro_batch = f"{counted(batch, 'pair' if kind == 'dpo' else 'completion')} on {_each_of(processes)}"
    if kind == "dpo":
        step = f"{batch * processes * accumulated} pairs in {counted(accumulated, 'micro-batch')} on each process"
        return [("micro-batch", micro_batch), ("optimizer step", step), ("run", _run(args, dpo_steps(args, rows)))]
    completions = int(args.generation_batch_size)
    prompts = completions // args.num_generations
    parts = int(args.steps_per_generation)
    of_a_round = parts * args.num_iterations / accumulated
    return [
        ("round", f"{counted(prompts, 'prompt')} x {args.num_generations} = {completions} completions (rows)"),
        ("micro-batch", f"{micro_batch}; {parts} per round, used {counted(args.num_iterations, 'time')}"),
        ("optimizer step", f"{counted(accumulated, 'micro-batch')}; {of_a_round:g} per round"),
        ("run", _run(args, steps.planned_steps(kind, args, rows))),
    ]


def dpo_steps(args: Any, rows: int | None) -> int:
    """Returns how many optimizer steps a run of DPO has. A stream needs `max_steps`."""
    if args.max_steps > 0 or rows is None:
        return max(1, int(args.max_steps))
    batch = args.train_batch_size * args.world_size
    batches = rows // batch if args.dataloader_drop_last else math.ceil(rows / batch)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def _run(args: Any, planned: int) -> str:
    source = "max_steps" if args.max_steps > 0 else f"num_train_epochs={args.num_train_epochs:g}"
    return f"{counted(planned, 'optimizer step')}, by {source}"


def _each_of(processes: int) -> str:
    return "the one process" if processes == 1 else f"each of {processes} processes"


def parameters(parsed: Parsed) -> Parameters | str:
    """Counts parameters by the configuration on disk, without weights. Returns why they are not known otherwise."""
    import torch
    import transformers
    from transformers import AutoConfig
    from trl import get_peft_config

    _, training, model, _ = parsed
    try:
        config = AutoConfig.from_pretrained(
            model.model_name_or_path,
            revision=model.model_revision,
            trust_remote_code=training.trust_remote_code,
            local_files_only=True,
        )
    except (OSError, ValueError):
        return f"there is no configuration of {os.path.basename(model.model_name_or_path)} on this disk"
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    if architecture is None:
        return f"the architecture {config.architectures} is not one of transformers"
    with torch.device("meta"):
        empty = architecture(config)
        total = sum(parameter.numel() for parameter in empty.parameters())
        adapter = get_peft_config(model)
        if adapter is not None:
            from peft import get_peft_model

            empty = get_peft_model(empty, adapter)
    trained = sum(parameter.numel() for parameter in empty.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in empty.parameters())
    dtype = str(model.dtype if model.dtype not in (None, "auto") else config.dtype or "float32")
    return Parameters(everything, trained, everything - total, dtype.removeprefix("torch."))


def memory(kind: TrainerKind, parsed: Parsed, found: Parameters | str) -> str:
    """Describes the memory of a process for weights, gradients and optimizer, or why it is not known."""
    _, args, model, _ = parsed
    if isinstance(found, str):
        return "not known"
    split = "DeepSpeed" if distribution.uses_deepspeed(args) else distribution.splits_parameters(args)
    if split is not None:
        return f"not known: {split} divides it over the processes"
    if model.load_in_4bit or model.load_in_8bit:
        return "not known: the weights are quantized"
    if found.dtype not in _BYTES:
        return f"not known: the weights are {found.dtype}"
    size, optimizer = _BYTES[found.dtype], str(getattr(args.optim, "value", args.optim))
    # with an adapter, the model without it is the reference
    has_reference = found.adapter == 0 and (kind == "dpo" or args.beta != 0.0)
    reference = found.total if has_reference else 0
    parts = {"weights": found.total, "reference model": reference, "gradients": found.trained}
    if optimizer in _ADAM:
        parts["optimizer"] = 2 * found.trained
    listed = ", ".join(f"{name} {bytes_text(count * size)}" for name, count in parts.items() if count)
    unknown = [] if optimizer in _ADAM else [f"optimizer {optimizer}"]
    unknown += ["activations", *([] if kind == "dpo" else ["generation"])]
    return f"{bytes_text(sum(parts.values()) * size)} on each process ({listed}); not counted: {', '.join(unknown)}"


def bytes_text(count: float) -> str:
    """Writes a number of bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
