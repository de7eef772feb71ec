"""Refusals: models, settings and batches for which sharing would not be exact, each with its reason and a way out.

They are checked before a packed forward. What shows only when a layer calls its attention is refused there, in
`attention_patch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
# Names of the embeddings that hold learned absolute positions.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


@dataclass(frozen=True)
class _Case:
    """The model and the batch in question.

    Attributes:
        model: The model, wrappers included.
        causal_lm: The transformers model with a head inside it.
        backbone: The part of it below the head.
        config: The configuration of the language part.
        longest: Tokens of the longest row.
        width: Columns of the padded batch.
    """

    model: nn.Module
    causal_lm: PreTrainedModel
    backbone: nn.Module
    config: Any
    longest: int
    width: int


def why_not(
    model: nn.Module | ModelParts,
    packing: Packing | None = None,
    *,
    longest: int = 0,
    backend: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Returns why shared prefixes cannot serve this model in its present mode, or None if they can.

    Args:
        model: The model, wrapped or not, or its parts. Dropout counts only where a module is in training mode.
        packing: The batch, for limits on the length of rows.
        longest: In place of a batch, the length of the longest row to expect.
        backend: The kernels to check as well. If only `dtype` is given, the best kernels are checked.
        device: Where the kernels run, None for the model's own device.
        dtype: The dtype that attention computes in. With None, the kernels stay unchecked until the first layer runs.

    Returns:
        A sentence with the reason and a way out.
    """
    try:
        model_parts = ModelParts.of(model)
        backbone = model_parts.backbone
    except RefusedError as error:
        return str(error)
    config = model_parts.text_config
    longest, width = (longest, longest) if packing is None else (packing.layout.longest, packing.slots.shape[1])
    case = _Case(model_parts.model, model_parts.causal_lm, backbone, config, longest, width)
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


def _inputs(case: _Case) -> Iterator[str]:
    """Refuses inputs other than text, and positions that are not a single number."""
    for name in ("vision_config", "audio_config"):
        if getattr(case.causal_lm.config, name, None) is not None:
            yield f"takes more than text ({name}). Load its text model, or turn shared prefixes off."
    for parameters in _rope_parameters(case.config):
        if parameters.get("mrope_section") is not None or parameters.get("rope_type") == "mrope":
            yield "has position ids of several axes (M-RoPE), but only positions on one axis can be packed."


def _layers(case: _Case) -> Iterator[str]:
    """Refuses layers that carry a state along the row, and attention to later tokens."""
    types = set(getattr(case.config, "layer_types", None) or ())
    unknown_types = sorted(types - _FULL_ATTENTION - _WINDOWED_ATTENTION - _FEED_FORWARD)
    is_stateful = bool(unknown_types) or getattr(case.causal_lm, "_is_stateful", False)
    is_stateful = is_stateful or any(isinstance(module, nn.Conv1d) for module in case.backbone.modules())
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
    if case.causal_lm.config.is_encoder_decoder:
        yield "is an encoder-decoder, but shared prefixes need a decoder alone."
    attention_owner = case.backbone if isinstance(case.backbone, PreTrainedModel) else case.causal_lm
    if not attention_owner._can_set_attn_implementation():
        yield (
            "does not call its attention through transformers' attention interface, so it cannot be replaced without "
            "editing the model file. Turn shared prefixes off for it."
        )
    if "position_ids" not in signature(type(case.causal_lm).forward).parameters:
        yield "takes no position_ids, so it cannot be told where the tokens of a packed row stand."
    if isinstance(case.model, nn.DataParallel):
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
        yield (
            "scales its queries by their place in the row that it is given, not by their position. Set "
            "attn_temperature_tuning=False."
        )


def _positions(case: _Case) -> Iterator[str]:
    """Refuses positions that depend on the padding of a row."""
    for name, module in case.backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES:
            yield (
                f"has learned absolute positions ({name}): the padded path counts a row's left padding, so its shared "
                "tokens stand at several positions. Turn shared prefixes off for it."
            )
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
    for name, module in case.model.named_modules():
        if not module.training:
            continue
        if isinstance(module, _DropoutNd) and module.p > 0:
            yield (
                f"drops activations in training ({name}, p={module.p}): rows would share the mask of their shared "
                "tokens. Set disable_dropout=True in the trainer's arguments, and lora_dropout=0 for adapters."
            )
        for attribute in ("attention_dropout", "dropout", "router_jitter_noise", "jitter_noise"):
            value = getattr(module, attribute, None)
            if isinstance(value, float) and value > 0:
                yield (
                    f"has {attribute}={value} in training ({name}): rows would share the noise of their shared tokens. "
                    "Set it to 0 in the model's configuration, or disable_dropout=True in the trainer's arguments."
                )


def _router(case: _Case) -> Iterator[str]:
    """Refuses an auxiliary loss that is averaged over tokens."""
    if getattr(case.config, "output_router_logits", False):
        yield (
            "asks for its router's auxiliary loss, which would count a shared token once instead of once per row. Set "
            "output_router_logits=False (model_init_kwargs), or turn shared prefixes off."
        )


def _adapters(case: _Case) -> Iterator[str]:
    """Refuses adapters that put virtual tokens before each row."""
    for module in case.model.modules():
        # Only a PeftModel has this method. The model inside it carries the adapters' configurations as well.
        if not hasattr(module, "get_base_model"):
            continue
        configs: Any = module.peft_config
        active: Any = module.active_adapter
        for name in [active] if isinstance(active, str) else active:
            if getattr(configs.get(name), "is_prompt_learning", False):
                yield (
                    f"has a prompt-learning adapter ({name}, {configs[name].peft_type}), whose virtual tokens would "
                    "stand before the packed row only once. Use LoRA, or turn shared prefixes off."
                )


# In this order: the first reason found is the one reported, so the more fundamental ones come first.
_CHECKS: tuple[Callable[[_Case], Iterator[str]], ...] = (
    _inputs,
    _layers,
    _interface,
    _windows,
    _attention_extras,
    _positions,
    _randomness,
    _router,
    _adapters,
)
