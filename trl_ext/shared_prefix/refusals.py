"""Refusals: models, settings and batches for which sharing would not be exact, each with its reason and a way out.

They are checked before a packed forward. What shows only when a layer calls its attention is refused there, in
`attention_patch`. What a model shows only when it runs is found by `traits` and `selfcheck`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from .backends import choose_backend
from .errors import RefusedError
from .model_parts import ModelParts
from .packing import Packing

# What transformers writes into a configuration's `layer_types`. Any other type is taken to carry a state.
_FULL_ATTENTION = {"full_attention", "attention", "hybrid_full"}
_WINDOWED_ATTENTION = {"sliding_attention", "chunked_attention"}
_FEED_FORWARD = {"moe", "dense", "sparse", "mlp"}
# Attributes of modules that make noise in training without a dropout module.
_NOISE = ("attention_dropout", "dropout", "residual_dropout", "router_jitter_noise", "jitter_noise", "moe_jitter_eps")


@dataclass(frozen=True)
class _Case:
    """The model and the batch in question.

    Attributes:
        parts: The parts of the model.
        backbone: The part of it below the head.
        config: The configuration of the language part.
        longest: Tokens of the longest row.
        width: Columns of the padded batch.
        packed: Tokens of the packed row.
        in_training: Whether all modules count as being in training mode.
    """

    parts: ModelParts
    backbone: nn.Module
    config: Any
    longest: int
    width: int
    packed: int
    in_training: bool


def why_not(
    model: nn.Module | ModelParts,
    packing: Packing | None = None,
    *,
    longest: int = 0,
    backend: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    in_training: bool = False,
) -> str | None:
    """Returns why shared prefixes cannot serve this model in its present mode, or None if they can.

    Args:
        model: The model, wrapped or not, or its parts. Dropout counts only where a module is in training mode.
        packing: The batch, for limits on the length of rows.
        longest: In place of a batch, the length of the longest row to expect.
        backend: The kernels to check as well. If only `dtype` is given, the best kernels are checked.
        device: Where the kernels run, None for the model's own device.
        dtype: The dtype that attention computes in. With None, the kernels stay unchecked until the first layer runs.
        in_training: Whether to take all modules for being in training mode, in place of the present one.

    Returns:
        A sentence with the reason and a way out.
    """
    try:
        model_parts = ModelParts.of(model)
        backbone = model_parts.backbone
    except RefusedError as error:
        return str(error)
    config = model_parts.text_config
    width = packed = longest
    if packing is not None:
        longest, width, packed = packing.layout.longest, packing.slots.shape[1], packing.packed_tokens
    case = _Case(model_parts, backbone, config, longest, width, packed, in_training)
    for check in _CHECKS:
        for reason in check(case):
            return f"{model_parts.class_name} {reason}"
    if dtype is not None:
        try:
            choose_backend(
                device or model_parts.device,
                dtype,
                head_dim=_head_dim(config),
                softcap=getattr(config, "attn_logit_softcapping", None) is not None,
                name=backend,
            )
        except RefusedError as error:
            return str(error)
    return None


def _head_dim(config: Any) -> int | None:
    """Returns the width of an attention head, if the configuration tells it."""
    width = getattr(config, "head_dim", None)
    if width is None and getattr(config, "num_attention_heads", None):
        width = config.hidden_size // config.num_attention_heads
    return width


# Each check below yields its reasons as the rest of a sentence that begins with the class of the model.


def _layers(case: _Case) -> Iterator[str]:
    """Refuses layers that carry a state along the row, and attention to later tokens."""
    types = set(getattr(case.config, "layer_types", None) or ())
    unknown_types = sorted(types - _FULL_ATTENTION - _WINDOWED_ATTENTION - _FEED_FORWARD)
    # A class of hybrid models is marked as stateful even if all layers of this model are attention.
    is_stateful = bool(unknown_types) or (not types and getattr(case.parts.causal_lm, "_is_stateful", False))
    is_stateful = is_stateful or any(isinstance(module, nn.Conv1d) for module in case.parts.decoder.modules())
    if is_stateful:
        kinds = ", ".join(unknown_types) or "recurrent or convolutional"
        yield (
            f"has layers that are not plain attention ({kinds}): they carry a state along the row, which would run "
            "from one branch into the next. Turn shared prefixes off for it."
        )
    if getattr(case.config, "use_bidirectional_attention", False) or getattr(case.config, "is_causal", True) is False:
        yield "attends in both directions, so a prefix depends on what follows it."


def _interface(case: _Case) -> Iterator[str]:
    """Refuses models whose attention or positions cannot be set from outside."""
    if case.parts.causal_lm.config.is_encoder_decoder:
        yield "is an encoder-decoder, but shared prefixes need a decoder alone."
    attention_owner = case.backbone if isinstance(case.backbone, PreTrainedModel) else case.parts.causal_lm
    if not attention_owner._can_set_attn_implementation():
        yield (
            "does not call its attention through transformers' attention interface, so it cannot be replaced without "
            "editing the model file. Turn shared prefixes off for it."
        )
    if "position_ids" not in signature(type(case.parts.causal_lm).forward).parameters:
        yield "takes no position_ids, so it cannot be told where the tokens of a packed row stand."
    if isinstance(case.parts.model, nn.DataParallel):
        yield "runs under DataParallel, whose threads do not see the packed row. Use DistributedDataParallel."
    if getattr(case.config, "output_attentions", False) or getattr(case.config, "output_hidden_states", False):
        yield "is configured to return attentions or hidden states of every layer. Set both options to False."


def _windows(case: _Case) -> Iterator[str]:
    """Refuses windows and chunks that are shorter than the longest row."""
    types = getattr(case.config, "layer_types", None)
    for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        size = getattr(case.config, name, None)
        used = types is None or kind in types
        if name == "sliding_window" and getattr(case.config, "use_sliding_window", True) is False:
            used = False
        if size is not None and used and case.longest > size:
            yield (
                f"has {kind.replace('_', ' ')} over {size} tokens and the longest row has {case.longest}. "
                f"Up to {size} tokens the window changes nothing: keep rows that short, or turn shared prefixes off."
            )


def _attention_extras(case: _Case) -> Iterator[str]:
    """Refuses additions to the attention scores that the kernels do not have."""
    for name, _ in case.backbone.named_parameters():
        if name.rsplit(".", 1)[-1] in ("sinks", "sink"):
            yield (
                f"has attention sinks ({name}), which would count once in every call of the cascade. Turn shared "
                "prefixes off for it."
            )
    if getattr(case.config, "alibi", False):
        yield (
            "adds a bias by distance to its attention scores (ALiBi), which the kernels do not have. Turn shared "
            "prefixes off for it."
        )
    if getattr(case.config, "attn_temperature_tuning", False):
        scale = getattr(case.config, "floor_scale", 0)
        if max(case.width, case.packed) >= scale:
            yield (
                f"scales its queries by their place in the row that it is given, not by their position, from place "
                f"{scale} on. Set attn_temperature_tuning=False, or keep micro-batches below that many tokens."
            )


def _positions(case: _Case) -> Iterator[str]:
    """Refuses rotary frequencies that depend on the padding of a row."""
    for parameters in _rope_parameters(case.config):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = parameters.get("original_max_position_embeddings") or case.config.max_position_embeddings
            if case.width > limit:
                yield (
                    f"changes its rotary frequencies with the padded length (rope_type {parameters['rope_type']!r}) "
                    f"beyond {limit} tokens, and rows are {case.width} wide. Stay within {limit} tokens."
                )


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yields each set of rotary parameters: the one for all layers, and those for the types of layers."""
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict):
            yield parameters
            yield from (value for value in parameters.values() if isinstance(value, dict))


def _randomness(case: _Case) -> Iterator[str]:
    """Refuses dropout and noise, which are independent for each row on the dense path."""
    for name, module in case.parts.model.named_modules():
        if not module.training and not case.in_training:
            continue
        if isinstance(module, _DropoutNd) and module.p > 0:
            way_out = "lora_dropout=0" if "lora_dropout" in name else "disable_dropout=True in the trainer's arguments"
            yield (
                f"drops activations in training ({name}, p={module.p}): rows would share the mask of their shared "
                f"tokens. Set {way_out}."
            )
        for attribute in _NOISE:
            value = vars(module).get(attribute)
            if isinstance(value, float) and value > 0:
                yield (
                    f"has {attribute}={value} in training ({name}): rows would share the noise of their shared tokens. "
                    f"{_way_out_of_noise(case.parts, attribute, value)} (disable_dropout does not reach it)."
                )
    embeddings = case.parts.embeddings
    if getattr(embeddings, "neftune_noise_alpha", None) and (embeddings.training or case.in_training):
        yield "gets noise on its embeddings in training, which rows would share. Leave out neftune_noise_alpha."


def named_noise(model_parts: ModelParts, in_training: bool = False) -> str | None:
    """Returns the reason of `why_not` if it is dropout or noise that modules name, None otherwise."""
    config = model_parts.text_config
    case = _Case(model_parts, model_parts.backbone, config, 0, 0, 0, in_training)
    reason = next(_randomness(case), None)
    return None if reason is None else f"{model_parts.class_name} {reason}"


def names_noise(module: nn.Module) -> bool:
    """Returns whether a module has a setting for noise, on or off."""
    return any(isinstance(vars(module).get(attribute), float) for attribute in _NOISE)


@contextmanager
def named_noise_off(model_parts: ModelParts) -> Iterator[None]:
    """Switches off all dropout and noise that modules name while the context is open."""
    values: list[tuple[nn.Module, str, float]] = []
    for module in model_parts.modules:
        for attribute in ("p",) if isinstance(module, _DropoutNd) else _NOISE:
            value = vars(module).get(attribute)
            if isinstance(value, float) and value > 0:
                values.append((module, attribute, value))
                setattr(module, attribute, 0.0)
    try:
        yield
    finally:
        for module, attribute, value in values:
            setattr(module, attribute, value)


def _way_out_of_noise(model_parts: ModelParts, attribute: str, value: float) -> str:
    """Names the setting that a module's attribute comes from: one with its name, or a name like it and its value."""
    settings = [
        (config, name)
        for config in model_parts.configs
        for name, setting in vars(config).items()
        if setting == value and (attribute in name or name in attribute)
    ]
    settings.sort(key=lambda setting: setting[1] != attribute)
    config, name = settings[0] if settings else (model_parts.causal_lm.config, attribute)
    if config is model_parts.causal_lm.config:
        return f"Set {name}=0.0 in the model's configuration, with model_init_kwargs={{{name!r}: 0.0}}"
    return f"Set {name}=0.0 in the {type(config).__name__} of the model"


def _adapters(case: _Case) -> Iterator[str]:
    """Refuses adapters that put virtual tokens before each row, or that look for tokens in it."""
    for name, config in case.parts.adapters.items():
        if getattr(config, "is_prompt_learning", False):
            yield (
                f"has a prompt-learning adapter ({name}, {config.peft_type}), whose virtual tokens would stand before "
                "the packed row only once. Use LoRA, or turn shared prefixes off."
            )
        if getattr(config, "alora_invocation_tokens", None):
            yield (
                f"has an activated LoRA ({name}), which looks for its invocation tokens once in each row that it is "
                "given, and a packed row holds several. Use LoRA without alora_invocation_tokens, or turn shared "
                "prefixes off."
            )


# In this order: the first reason found is the one reported, so the more fundamental ones come first.
_CHECKS: tuple[Callable[[_Case], Iterator[str]], ...] = (
    _layers,
    _interface,
    _windows,
    _attention_extras,
    _positions,
    _randomness,
    _adapters,
)
