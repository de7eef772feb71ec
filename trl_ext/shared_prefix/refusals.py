"""Models, settings and batches for which sharing prefixes would not be exact, each with its reason and the way out.

Checked before a packed forward. What only shows when a layer calls its attention is refused there (`attention_patch.py`).
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
from .model_parts import find_backbone, find_causal_lm, model_device, text_config
from .packing import Packing

_FULL = {"full_attention", "attention", "hybrid_full"}
_WINDOWED = {"sliding_attention", "chunked_attention"}
_FEED_FORWARD = {"moe", "dense", "sparse", "mlp"}
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


@dataclass(frozen=True)
class _Case:
    """What is asked: the parts of the model, and the batch if there is one."""

    model: nn.Module
    lm: PreTrainedModel
    backbone: nn.Module
    config: Any
    longest: int
    width: int


def why_not(
    model: nn.Module,
    packing: Packing | None = None,
    *,
    longest: int = 0,
    backend: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> str | None:
    """Why shared prefixes cannot serve this model in its present mode, or None if they can.

    Args:
        model: The model, wrapped or not. Dropout counts only where a module is in training mode.
        packing: The batch, for limits on the length of rows.
        longest: Instead of a batch, the longest row to expect.
        backend: Also check these kernels, or with `dtype` alone the best ones.
        device: Where the kernels run, the model's own device if None.
        dtype: The type that attention computes in; None leaves the kernels unchecked until the first layer runs.

    Returns:
        A sentence with the reason and the way out.
    """
    try:
        lm, backbone = find_causal_lm(model), find_backbone(model)
    except RefusedError as error:
        return str(error)
    longest, width = (longest, longest) if packing is None else (packing.layout.longest, packing.slots.shape[1])
    case = _Case(model, lm, backbone, text_config(model), longest, width)
    for check in _CHECKS:
        for reason in check(case):
            return f"{type(lm).__name__} {reason}"
    if dtype is not None:
        try:
            choose_backend(
                device or model_device(model),
                dtype,
                head_dim=head_dim(case.config),
                softcap=getattr(case.config, "attn_logit_softcapping", None) is not None,
                name=backend,
            )
        except RefusedError as error:
            return str(error)
    return None


def head_dim(config: Any) -> int | None:
    """Width of an attention head, if the configuration says it."""
    width = getattr(config, "head_dim", None)
    if width is None and getattr(config, "num_attention_heads", None):
        width = config.hidden_size // config.num_attention_heads
    return width


def _interface(case: _Case) -> Iterator[str]:
    if case.lm.config.is_encoder_decoder:
        yield "is an encoder-decoder; shared prefixes need a decoder alone."
    inner = case.backbone if isinstance(case.backbone, PreTrainedModel) else case.lm
    if not inner._can_set_attn_implementation():
        yield (
            "does not call its attention through transformers' attention interface, so it cannot be replaced without "
            "editing the model file. Turn shared prefixes off for it."
        )
    if "position_ids" not in signature(type(case.lm).forward).parameters:
        yield "takes no position_ids, so a packed row cannot say where its tokens stand."
    if isinstance(case.model, nn.DataParallel):
        yield "runs under DataParallel, whose threads do not see the packed row. Use DistributedDataParallel."
    if getattr(case.config, "output_attentions", False) or getattr(case.config, "output_hidden_states", False):
        yield "is configured to return attentions or hidden states of every layer. Set both options to False."


def _inputs(case: _Case) -> Iterator[str]:
    for name in ("vision_config", "audio_config"):
        if getattr(case.lm.config, name, None) is not None:
            yield f"takes more than text ({name}). Load its text model, or turn shared prefixes off."
    for parameters in _rope(case.config):
        if parameters.get("mrope_section") is not None or parameters.get("rope_type") == "mrope":
            yield "has position ids of several axes (M-RoPE); only positions on one axis can be packed."


def _layers(case: _Case) -> Iterator[str]:
    types = set(getattr(case.config, "layer_types", None) or ())
    other = sorted(types - _FULL - _WINDOWED - _FEED_FORWARD)
    carries_state = bool(other) or getattr(case.lm, "_is_stateful", False)
    carries_state = carries_state or any(isinstance(m, nn.Conv1d) for m in case.backbone.modules())
    if carries_state:
        kinds = ", ".join(other) or "recurrent or convolutional"
        yield (
            f"has layers that are not plain attention ({kinds}): they carry a state along the row, which would run "
            "from one branch into the next. Turn shared prefixes off for it."
        )
    if getattr(case.config, "use_bidirectional_attention", False) or getattr(case.config, "is_causal", True) is False:
        yield "attends in both directions, so a prefix depends on what follows it."


def _windows(case: _Case) -> Iterator[str]:
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
    for name, _ in case.backbone.named_parameters():
        if name.rsplit(".", 1)[-1] in ("sinks", "sink"):
            yield (
                f"has attention sinks ({name}), which would count once for each part of the cascade. Turn shared "
                "prefixes off for it."
            )
    if getattr(case.config, "alibi", False):
        yield "adds a bias by distance to its attention scores (ALiBi), which the kernels do not have."
    if getattr(case.config, "attn_temperature_tuning", False):
        yield (
            "scales its queries by where they stand in the row handed over, not by their position. Set "
            "attn_temperature_tuning=False."
        )


def _positions(case: _Case) -> Iterator[str]:
    for name, module in case.backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in _POSITION_TABLES:
            yield (
                f"has learned absolute positions ({name}): the padded path counts a row's left padding, so its shared "
                "tokens stand at several positions. Turn shared prefixes off for it."
            )
    for parameters in _rope(case.config):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limit = parameters.get("original_max_position_embeddings") or case.config.max_position_embeddings
            if case.width > limit:
                yield (
                    f"changes its rotary frequencies with the padded length (rope_type {parameters['rope_type']!r}) "
                    f"beyond {limit} tokens, and rows are {case.width} wide. Stay within {limit} tokens."
                )


def _rope(config: Any) -> Iterator[dict[str, Any]]:
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None)
        if isinstance(parameters, dict):
            yield parameters
            yield from (value for value in parameters.values() if isinstance(value, dict))


def _randomness(case: _Case) -> Iterator[str]:
    for name, module in case.model.named_modules():
        if not module.training:
            continue
        if isinstance(module, _DropoutNd) and module.p > 0:
            yield (
                f"drops activations out in training ({name}, p={module.p}): shared tokens would share their mask. Set "
                "disable_dropout=True in the trainer's arguments, and lora_dropout=0 for adapters."
            )
        for attribute in ("attention_dropout", "dropout", "router_jitter_noise", "jitter_noise"):
            value = getattr(module, attribute, None)
            if isinstance(value, float) and value > 0:
                yield (
                    f"has {attribute}={value} in training ({name}): shared tokens would share its noise. Set it to 0 "
                    "in the model's configuration, or disable_dropout=True in the trainer's arguments."
                )


def _router(case: _Case) -> Iterator[str]:
    if getattr(case.config, "output_router_logits", False):
        yield (
            "asks for its router's auxiliary loss, which would count a shared token once instead of once a row. Set "
            "output_router_logits=False (model_init_kwargs), or turn shared prefixes off."
        )


def _adapters(case: _Case) -> Iterator[str]:
    for module in case.model.modules():
        if not hasattr(module, "get_base_model"):  # a PeftModel; the model inside also carries its configurations
            continue
        configs: Any = module.peft_config
        active: Any = module.active_adapter
        for name in [active] if isinstance(active, str) else active:
            if getattr(configs.get(name), "is_prompt_learning", False):
                yield (
                    f"has a prompt-learning adapter ({name}, {configs[name].peft_type}), whose virtual tokens would "
                    "stand before the packed row once. Use LoRA, or turn shared prefixes off."
                )


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
