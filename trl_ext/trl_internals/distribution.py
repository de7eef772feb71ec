"""Distribution of a run over processes, as its arguments and accelerate's environment say before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

_SPLIT_SIZES = {"dp_shard_size": "sharded data parallelism", "tp_size": "tensor parallelism"}
"""Sizes of accelerate's `ParallelismConfig` that split parameters, with what they are called."""


def splits_parameters(args: Any) -> str | None:
    """Returns what splits the parameters of the policy over processes, or None if each process has all of them.

    Args:
        args: The training arguments. They know DeepSpeed and what the user set. Accelerate's launcher says the rest in
            the environment.
    """
    return next(_splits(args), None)


def uses_deepspeed(args: Any) -> bool:
    """Returns whether DeepSpeed trains the policy, at any stage."""
    return getattr(args, "deepspeed_plugin", None) is not None


def _splits(args: Any) -> Iterator[str]:
    """Yields everything that splits parameters."""
    # transformers makes the plugin from `deepspeed` and from the environment, stage included
    if uses_deepspeed(args) and str(args.deepspeed_plugin.zero_stage) == "3":
        yield "DeepSpeed ZeRO stage 3"
    if getattr(args, "fsdp", None) or _is_on("ACCELERATE_USE_FSDP"):
        yield "FSDP"
    if _is_on("ACCELERATE_USE_MEGATRON_LM"):
        yield "Megatron-LM"
    sizes = getattr(args, "parallelism_config", None)
    for name, words in _SPLIT_SIZES.items():
        if sizes is not None:
            size = getattr(sizes, name)
        else:
            in_use = _is_on("ACCELERATE_USE_PARALLELISM_CONFIG")
            size = int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) if in_use else 1
        if size > 1:
            yield f"{words} ({name}={size})"
    if (getattr(args, "model_init_kwargs", None) or {}).get("tp_plan") is not None:
        yield "tensor parallelism (tp_plan in model_init_kwargs)"


def _is_on(switch: str) -> bool:
    """Returns whether a switch of accelerate is on. Accelerate takes no other word for yes."""
    return os.environ.get(switch, "false").lower() == "true"
