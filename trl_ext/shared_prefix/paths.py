"""Paths: the packed and the dense way to score the tokens of a micro-batch, both without any checks.

On the packed path, the backbone sees each shared token once. A hook behind it hands the head only the hidden states
that predict a scored token. TRL's fused head, or the model's own, runs unchanged on these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .attention_patch import AttentionPatch, packed_attention
from .errors import SharedPrefixError
from .log_probs import token_log_probs
from .model_parts import ModelParts
from .packing import PackedRow, Packing

# On a CPU, at most this many logits go through the model's own head in place of a fused one. They take 256 MiB.
MOST_LOGITS = 1 << 26
FUSED_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def packed_scores(
    model: nn.Module | ModelParts,
    packing: Packing,
    *,
    compute_entropy: bool = False,
    temperature: float | None = None,
    backend: str | None = None,
) -> tuple[dict[str, torch.Tensor], AttentionPatch]:
    """Scores the tokens of a packing on the packed path, without checks.

    Returns:
        The fields of the head, each (B, L) as in `shared_prefix_scores`, and the patch that served the attention.
    """
    model_parts = ModelParts.of(model)
    # Without a temperature only the fused head knows the one that it was added with.
    replaceable = temperature is not None and _own_head_is_faster(model_parts, packing)
    fused = model_parts.has_fused_head and not replaceable
    head_arguments = {"shift_labels": packing.shift_labels, "fused_lm_head": True} if fused else {}
    output, patch = _packed_forward(model_parts, packing, backend, head_arguments)
    if fused:
        fields = _fused_fields(output, compute_entropy)
    else:
        fields = _own_fields(output.logits[0], packing.shift_labels[0], compute_entropy, temperature)
    return {name: packing.unpack(values) for name, values in fields.items()}, patch


def packed_logits(model: nn.Module | ModelParts, packing: PackedRow, backend: str | None = None) -> torch.Tensor:
    """Returns the model's own logits (M, vocabulary) for the predictions of a packing, without checks.

    A fused head is not used, and neither is the temperature that it was added with.
    """
    output, _ = _packed_forward(ModelParts.of(model), packing, backend, {})
    logits: torch.Tensor = output.logits[0]
    return logits


def dense_scores(
    model: nn.Module | ModelParts,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    score_mask: torch.Tensor,
    *,
    compute_entropy: bool = False,
    temperature: float | None = None,
) -> dict[str, torch.Tensor]:
    """Scores tokens on the dense path, as TRL runs it. The fields are laid out as in `shared_prefix_scores`."""
    model_parts = ModelParts.of(model)
    scored = score_mask.bool()
    text_only = model_parts.text_only_arguments(input_ids)
    if model_parts.has_fused_head:
        labels = input_ids.masked_fill(~scored, -100)
        output = model_parts.model(
            input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True, **text_only
        )
        # The head returns at column j the value for token j + 1.
        fields = _fused_fields(output, compute_entropy)
        return {name: nn.functional.pad(values, (1, 0)) for name, values in fields.items()}
    logits = model_parts.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **text_only).logits
    # The logits of a column predict the token of the next one.
    scored = scored[:, 1:]
    fields = _own_fields(logits[:, :-1][scored], input_ids[:, 1:][scored], compute_entropy, temperature)
    zeros = fields["log_probs"].new_zeros(input_ids.shape)
    places = nn.functional.pad(scored, (1, 0))
    return {name: zeros.masked_scatter(places, values) for name, values in fields.items()}


def _packed_forward(
    model_parts: ModelParts, packing: PackedRow, backend: str | None, head_arguments: dict[str, Any]
) -> tuple[Any, AttentionPatch]:
    """Runs the model on the packed row. Its head sees the predictors only."""
    rows = packing.predictors.unique()
    with (
        packed_attention(model_parts, packing.layout, backend, rows) as patch,
        _only_predictors(model_parts, packing),
    ):
        output = model_parts.model(
            input_ids=packing.input_ids,
            position_ids=packing.position_ids,
            use_cache=False,
            **head_arguments,
            **model_parts.text_only_arguments(packing.input_ids),
        )
    if patch.backend is None:
        raise SharedPrefixError(
            f"{type(model_parts.model).__name__} ran without calling the attention it was given. Does its attention go "
            "through transformers' attention interface? Turn shared prefixes off for it."
        )
    return output, patch


@contextmanager
def _only_predictors(model_parts: ModelParts, packing: PackedRow) -> Iterator[None]:
    """Makes the backbone return only the hidden states that make predictions, (1, M, hidden).

    Some models leave out their backbone and call the decoder inside it. The decoder is served then.
    """
    backbone, decoder = model_parts.backbone, model_parts.decoder
    calls, inside = 0, False

    def enter_backbone(module: nn.Module, args: Any) -> None:
        """Notes that the decoder is called by the backbone, which will return the hidden states."""
        nonlocal inside
        inside = True

    def select_in_decoder(module: nn.Module, args: Any, output: Any) -> Any:
        """Replaces the last hidden states if the backbone will not."""
        return None if inside else select_predictors(module, args, output)

    def select_predictors(module: nn.Module, args: Any, output: Any) -> Any:
        """Replaces the last hidden states by those of the predictors."""
        nonlocal calls
        calls += 1
        hidden = output[0]
        if hidden.shape[:2] != packing.input_ids.shape:
            raise SharedPrefixError(
                f"{type(module).__name__} returned hidden states {tuple(hidden.shape)} for a packed row "
                f"{tuple(packing.input_ids.shape)}. Turn shared prefixes off for this model."
            )
        # A hidden state that makes several predictions is repeated here, once for each of its labels.
        selected = hidden.index_select(1, packing.predictors.to(hidden.device))
        if isinstance(output, tuple):
            return (selected, *output[1:])
        output.last_hidden_state = selected
        return output

    handles = [
        backbone.register_forward_pre_hook(enter_backbone),
        backbone.register_forward_hook(select_predictors),
    ]
    if decoder is not backbone:
        handles.append(decoder.register_forward_hook(select_in_decoder))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if calls != 1:
        raise SharedPrefixError(
            f"{type(backbone).__name__} was called {calls} times as a module in one forward, expected once. The head "
            "cannot be given the right hidden states. Turn shared prefixes off for this model."
        )


def _own_head_is_faster(model_parts: ModelParts, packing: Packing) -> bool:
    """Returns whether the model's own head is faster than its fused one: in float32 on a CPU, if its logits fit."""
    logits = packing.predictors.numel() * model_parts.vocabulary
    return model_parts.device.type == "cpu" and model_parts.compute_dtype == torch.float32 and logits <= MOST_LOGITS


def _fused_fields(output: Any, entropy: bool) -> dict[str, torch.Tensor]:
    """Returns the fields that TRL's fused head computed."""
    fields = {name: getattr(output, name, None) for name in FUSED_FIELDS}
    if entropy and fields["entropy"] is None:
        raise ValueError(
            "Entropies were asked for, but the fused head was added without them: "
            'add_fused_lm_head(model, outputs=("log_probs", "entropy")).'
        )
    return {name: values for name, values in fields.items() if values is not None}


def _own_fields(
    logits: torch.Tensor, labels: torch.Tensor, entropy: bool, temperature: float | None
) -> dict[str, torch.Tensor]:
    """Computes the fields from the logits (M, vocabulary) of the model's own head."""
    logps, entropies = token_log_probs(logits, labels, temperature or 1.0, entropy)
    return {"log_probs": logps} if entropies is None else {"log_probs": logps, "entropy": entropies}
