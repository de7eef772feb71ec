"""TRL's tuple of a generated round, what its tool loop needs, how it samples, and what it records of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from trl_ext_hooks import Generation, TrainerKind

from ..errors import CompatError
from .trainer_state import add_metric, mode

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


# --- one pass of several ----------------------------------------------------------------------------------------------

_NEUTRAL = {"do_sample": False, "num_beams": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
"""Settings of transformers under which the most likely token is taken, and that it does not warn of."""
_SAMPLING = ("n", "best_of", "temperature", "top_p", "top_k", "min_p", "seed")
"""Settings of vLLM in `generation_kwargs` that would win over a temperature of 0."""


@contextlib.contextmanager
def greedy(trainer: Any) -> Iterator[None]:
    """Lets the trainer's engine take the most likely token in the block."""
    if trainer.use_vllm:
        engine = trainer.vllm_generation
        kwargs = {name: value for name, value in engine.generation_kwargs.items() if name not in _SAMPLING}
        with _attributes(engine, temperature=0.0, generation_kwargs=kwargs), one_each(trainer):
            yield
        return
    config = copy.deepcopy(trainer.generation_config)
    for name, value in _NEUTRAL.items():
        setattr(config, name, value)
    with _attributes(trainer, generation_config=config, generation_kwargs={**trainer.generation_kwargs, **_NEUTRAL}):
        yield


def samples_groups(trainer: Any) -> bool:
    """Tells whether the engine samples G completions of every G-th prompt, and so takes equal prompts for granted."""
    return bool(trainer.use_vllm) and trainer.vllm_mode == "server"


@contextlib.contextmanager
def one_each(trainer: Any) -> Iterator[None]:
    """Lets the engine sample one completion of every prompt in the block."""
    with _attributes(trainer, num_generations=1, num_generations_eval=1):
        yield


@contextlib.contextmanager
def tools_for(trainer: Any, rows: int) -> Iterator[None]:
    """Gives the tool loop as many rows as a pass has. Without environments all of them have the same tools."""
    names = ("_sync_tool_dicts", "_async_tool_dicts")
    held = {name: getattr(trainer, name, None) for name in names}
    with _attributes(trainer, **{name: [value[0]] * rows for name, value in held.items() if value}):
        yield


@contextlib.contextmanager
def _attributes(target: Any, **values: Any) -> Iterator[None]:
    """Sets attributes for the block."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


@dataclasses.dataclass
class Recorded:
    """What TRL recorded of a generation: metrics by name, and how many tokens it counted."""

    metrics: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    tokens: float = 0


@contextlib.contextmanager
def unrecorded(trainer: Any) -> Iterator[Recorded]:
    """Takes what TRL records in the block back, and hands it out."""
    metrics, recorded = trainer._metrics[mode(trainer)], Recorded()
    before = {name: list(values) for name, values in metrics.items()}
    seen = trainer.state.num_input_tokens_seen
    yield recorded
    for name in list(metrics):
        # TRL replaces this one, and the others grow
        if name != "num_tokens":
            recorded.metrics[name] = metrics[name][len(before.get(name, [])) :]
        if name in before:
            metrics[name] = before[name]
        else:
            del metrics[name]
    recorded.tokens = trainer.state.num_input_tokens_seen - seen
    trainer.state.num_input_tokens_seen = seen


def record(trainer: Any, recorded: Recorded) -> None:
    """Records a generation."""
    trainer.state.num_input_tokens_seen += recorded.tokens
    trainer._metrics[mode(trainer)]["num_tokens"] = [trainer.state.num_input_tokens_seen]
    for name, values in recorded.metrics.items():
        for value in values:
            add_metric(trainer, name, value)


def recorded_of(trainer: Any, generation: Generation, gather_objects: Callable[[list[Any]], list[Any]]) -> Recorded:
    """Returns what TRL would record of a generation, but for its tools. Collective.

    Args:
        trainer: GRPO or RLOO.
        generation: The rows of this process. Processes may hold different numbers of them.
        gather_objects: Returns the objects of all processes.
    """
    tokenizer = trainer._tokenizer
    ends = {*getattr(trainer, "eos_token_ids", [tokenizer.eos_token_id]), tokenizer.pad_token_id}
    written = generation.tool_mask or [[1] * len(ids) for ids in generation.completion_ids]
    rows = [
        [len(prompt), sum(mask), not ids or ids[-1] not in ends]
        for prompt, mask, ids in zip(generation.prompt_ids, written, generation.completion_ids, strict=True)
    ]
    prompts, lengths, cut = torch.tensor(gather_objects(rows)).reshape(-1, 3).unbind(dim=1)
    finished = lengths[cut == 0]
    if not len(finished):
        finished = torch.zeros(1, device=lengths.device)
    metrics = {"completions/clipped_ratio": [cut.float().mean().item()]}
    for name, values in (("length", lengths.float()), ("terminated_length", finished.float())):
        for kind in ("mean", "min", "max"):
            metrics[f"completions/{kind}_{name}"] = [getattr(values, kind)().item()]
    tokens = (prompts.sum() + lengths.sum()).item() if mode(trainer) == "train" else 0
    return Recorded(metrics, tokens)
