"""TRL's tuple of a generated round, and what its tool loop needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_ext_hooks import Generation, TrainerKind

from ..errors import CompatError

_GENERATED: dict[TrainerKind, tuple[str, ...]] = {
    "grpo": (
        "prompt_ids",
        "completion_ids",
        "tool_mask",
        "completions",
        "logprobs",
        "extra_fields",
        "images",
        "tool_images",
    ),
    "rloo": ("prompt_ids", "completion_ids", "completions"),
}
_OWN = ("prompt_ids", "completion_ids", "completions", "tool_mask", "logprobs")


def renders_tool_calls(arguments: Mapping[str, Any]) -> bool:
    """Tells, before the model is loaded, whether TRL's tool loop can work with the chat template.

    Args:
        arguments: The arguments with which a GRPO trainer is about to be built.
    """
    from transformers import AutoProcessor
    from trl.chat_template_utils import supports_tool_calling
    from trl.trainer.utils import get_config_model_id

    if not (arguments.get("tools") or arguments.get("environment_factory")):
        return True  # a `rollout_func` renders its own conversations
    processor = arguments.get("processing_class")
    if processor is None:
        model, args = arguments["model"], arguments["args"]
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        revision = (args.model_init_kwargs or {}).get("revision")
        remote = getattr(args, "trust_remote_code", False)
        processor = AutoProcessor.from_pretrained(name, revision=revision or "main", trust_remote_code=remote)
    return bool(supports_tool_calling(processor))


def unpack_generation(kind: TrainerKind, result: tuple[Any, ...]) -> Generation:
    """TRL's tuple of a generated round by names."""
    layout = _GENERATED[kind]
    if len(result) != len(layout):
        raise CompatError(f"{kind.upper()} generation returned {len(result)} values, expected {len(layout)}: {layout}.")
    named = dict(zip(layout, result, strict=True))
    own = {name: named.pop(name) for name in _OWN if name in named}
    return Generation(**own, extra=named)


_EMPTY: dict[str, Any] = {"extra_fields": {}, "images": None, "tool_images": []}
"""What TRL passes on beside tokens and texts, where there is nothing to pass on."""


def spread_extra(extra: Mapping[str, Any], source: Sequence[int], order: Sequence[int]) -> dict[str, Any]:
    """Returns what TRL passes on for rows that a rollout added: the lists of fields that have a value per prompt.

    Args:
        extra: What a rollout returned as `extra`.
        source: The prompt of each row.
        order: The row that each row repeats, among those that the rollout returned.
    """
    spread = dict(extra)
    fields = dict(spread.get("extra_fields") or {})
    for name, values in fields.items():
        if isinstance(values, list):
            per_row = len(values) > max(source) + 1
            fields[name] = [values[place] for place in (order if per_row else source)]
    if fields:
        spread["extra_fields"] = fields
    return spread


def pack_generation(kind: TrainerKind, generation: Generation) -> tuple[Any, ...]:
    named = {**_EMPTY, **generation.extra, **{name: getattr(generation, name) for name in _OWN}}
    return tuple(named[name] for name in _GENERATED[kind])
