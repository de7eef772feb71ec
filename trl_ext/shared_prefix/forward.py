"""Log-probabilities of a padded micro-batch through one packed row: the function to call.

    logps, entropies, report = shared_prefix_logps(model, input_ids, attention_mask, logits_to_keep)

takes and returns what TRL's per-token log-probability forward takes and returns, for policy, old and reference models,
with the same gradients. The backbone sees each shared token once. A hook behind it hands the head only those hidden
states that predict a scored token, so that TRL's fused head, or the model's own, runs unchanged on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from . import selfcheck
from .attention_patch import Entry, packed_attention
from .errors import RefusedError, SharedPrefixError
from .log_probs import log_probs
from .model_parts import compute_dtype, embedding, find_backbone, has_fused_head
from .packing import PackedRow, Packing, pack
from .refusals import why_not
from .tree import MIN_RUN

MIN_GAIN = 1.1
MOST_LOGITS = 1 << 26  # on a CPU: at most so many go through the model's own head, 256 MiB of them
FUSED_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Report:
    """What one forward did.

    Attributes:
        packed: Whether the packed path ran.
        reason: Why the dense path ran instead, else None.
        dense_tokens: Positions of the padded batch.
        packed_tokens: Positions of the packed row.
        token_ratio: The first by the second.
        scored: Predictions that went through the head in the packed path.
        levels: Levels of the prefix tree.
        backend: The attention kernels, None on the dense path.
        pack_seconds: Time spent on building tree and indices.
    """

    packed: bool
    reason: str | None
    dense_tokens: int
    packed_tokens: int
    token_ratio: float
    scored: int
    levels: int
    backend: str | None
    pack_seconds: float


def shared_prefix_logps(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int,
    *,
    compute_entropy: bool = False,
    temperature: float | None = None,
    backend: str | None = None,
    min_gain: float = MIN_GAIN,
    min_run: int = MIN_RUN,
    on_refusal: Literal["error", "dense"] = "error",
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, Report]:
    """Log-probabilities of the completion tokens, each shared token computed once.

    Args:
        model: A causal language model of transformers, in any wrapper. With TRL's fused head it is called through
            `model(..., shift_labels=..., fused_lm_head=True)`; without, its own head projects the scored positions.
        input_ids: (B, P + T) prompts padded left, completions padded right.
        attention_mask: (B, P + T) 1 for real tokens.
        logits_to_keep: `T`, the width of the completions.
        compute_entropy: Whether to return entropies. A fused head must have been asked for them when it was added.
        temperature: Divides the logits, 1 if None. For a model with TRL's fused head give the one it was added with, or
            None. Where it is given, the packed path on a CPU takes the model's own head, which is faster there.
        backend: "flash_attn", "aten", "math", or None for the best that runs.
        min_gain: Below this ratio of dense to packed tokens the dense path runs; 0 to always pack.
        min_run: Shortest run of tokens to share below the first level.
        on_refusal: What to do when sharing would not be exact or differs in the first-use check: raise the reason, or
            run the dense path and report it.
        check: Compare with the dense path on the first use of a model class, kernels and type.

    Returns:
        Log-probabilities (B, T), 0 at masked positions; entropies (B, T) or None; and the report.
    """
    scores, report = shared_prefix_scores(
        model,
        input_ids,
        attention_mask,
        logits_to_keep=logits_to_keep,
        compute_entropy=compute_entropy,
        temperature=temperature,
        backend=backend,
        min_gain=min_gain,
        min_run=min_run,
        on_refusal=on_refusal,
        check=check,
    )
    logps = scores["log_probs"]
    entropies = scores["entropy"][:, -logits_to_keep:] if compute_entropy else None
    return logps[:, -logits_to_keep:], entropies, report


def shared_prefix_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    score_mask: torch.Tensor | None = None,
    logits_to_keep: int | None = None,
    compute_entropy: bool = False,
    temperature: float | None = None,
    backend: str | None = None,
    min_gain: float = MIN_GAIN,
    min_run: int = MIN_RUN,
    on_refusal: Literal["error", "dense"] = "error",
    check: bool = True,
) -> tuple[dict[str, torch.Tensor], Report]:
    """Everything the head returns for the tokens to score; for preference pairs, which are padded right only.

    Args:
        score_mask: (B, L) nonzero for the tokens to score. Or give `logits_to_keep`.

    Returns:
        For each of TRL's per-token fields that the head computed ("log_probs", "entropy", "mean_logits", ...) a (B, L)
        tensor that holds at column `j` the value for token `j`, 0 where nothing is scored. `[:, 1:]` is what the fused
        head returns for `labels`. Other arguments as in `shared_prefix_logps`.
    """
    began = perf_counter()
    packing = pack(input_ids, attention_mask, logits_to_keep, score_mask=score_mask, min_run=min_run)
    seconds = perf_counter() - began
    reason, entry = None, None
    if not packing.packed_tokens:
        reason = "no token is scored"
    elif packing.token_ratio < min_gain:
        reason = f"{packing.token_ratio:.2f} dense tokens for a packed one, fewer than min_gain={min_gain}"
    else:
        refusal = why_not(model, packing)
        try:
            if refusal is not None:
                raise RefusedError(f"Shared prefixes refused: {refusal}")
            if check:
                selfcheck.ensure(model, backend, temperature)
            scores, entry = packed_scores(
                model, packing, compute_entropy=compute_entropy, temperature=temperature, backend=backend
            )
        except SharedPrefixError as error:
            if on_refusal == "error":
                raise
            reason = str(error)
    if reason is not None:
        scores = dense_scores(
            model,
            input_ids,
            attention_mask,
            packing.slots < packing.predictors.numel(),
            compute_entropy=compute_entropy,
            temperature=temperature,
        )
    report = Report(
        packed=reason is None,
        reason=reason,
        dense_tokens=packing.dense_tokens,
        packed_tokens=packing.packed_tokens,
        token_ratio=packing.token_ratio,
        scored=packing.predictors.numel(),
        levels=packing.tree.depth,
        backend=None if entry is None else entry.kernels,
        pack_seconds=seconds,
    )
    return scores, report


def packed_scores(
    model: nn.Module,
    packing: Packing,
    *,
    compute_entropy: bool = False,
    temperature: float | None = None,
    backend: str | None = None,
) -> tuple[dict[str, torch.Tensor], Entry]:
    """The packed path for a packing made before, without checks. Returns the fields (B, L) and what ran."""
    fused = has_fused_head(model) and not (temperature is not None and _own_head_is_faster(model, packing))
    head = {"shift_labels": packing.shift_labels, "fused_lm_head": True} if fused else {}
    output, entry = _packed_forward(model, packing, backend, head)
    fields = _fields(output, packing.shift_labels, fused, compute_entropy, temperature)
    return {name: packing.unpack(values) for name, values in fields.items()}, entry


def packed_logits(model: nn.Module, packing: PackedRow, backend: str | None = None) -> torch.Tensor:
    """The model's own logits (M, vocabulary) for the predictions of a packing, without checks.

    A fused head stays aside, and with it the temperature that it was added with.
    """
    output, _ = _packed_forward(model, packing, backend, {})
    logits: torch.Tensor = output.logits[0]
    return logits


def _packed_forward(
    model: nn.Module, packing: PackedRow, backend: str | None, head: dict[str, Any]
) -> tuple[Any, Entry]:
    inputs: dict[str, Any] = {"input_ids": packing.input_ids, "position_ids": packing.position_ids, "use_cache": False}
    rows = packing.predictors.unique()
    with packed_attention(model, packing.layout, backend, rows) as entry, _gathered(find_backbone(model), packing):
        output = model(**inputs, **head)
    if entry.backend is None:
        raise SharedPrefixError(
            f"{type(model).__name__} ran without calling the attention it was given. Does its attention go through "
            "transformers' attention interface? Turn shared prefixes off for it."
        )
    return output, entry


def dense_scores(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    score_mask: torch.Tensor,
    *,
    compute_entropy: bool = False,
    temperature: float | None = None,
) -> dict[str, torch.Tensor]:
    """The dense path, as TRL runs it, with results laid out as in `shared_prefix_scores`."""
    fused = has_fused_head(model)
    labels = input_ids.masked_fill(~score_mask.bool(), -100)
    if fused:
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True)
        fields = _fields(output, labels, True, compute_entropy, temperature)
        return {name: nn.functional.pad(values, (1, 0)) for name, values in fields.items()}
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    scored = score_mask.bool()[:, 1:]
    logps, entropies = log_probs(logits[:, :-1][scored], labels[:, 1:][scored], temperature or 1.0, compute_entropy)
    fields = {"log_probs": logps} if entropies is None else {"log_probs": logps, "entropy": entropies}
    empty = logps.new_zeros(input_ids.shape)
    places = nn.functional.pad(scored, (1, 0))
    return {name: empty.masked_scatter(places, values) for name, values in fields.items()}


def _own_head_is_faster(model: nn.Module, packing: Packing) -> bool:
    weight = embedding(model)
    logits = packing.predictors.numel() * weight.shape[0]
    return weight.device.type == "cpu" and compute_dtype(model) == torch.float32 and logits <= MOST_LOGITS


def _fields(
    output: Any, labels: torch.Tensor, fused: bool, entropy: bool, temperature: float | None
) -> dict[str, torch.Tensor]:
    if fused:
        fields = {name: getattr(output, name, None) for name in FUSED_FIELDS}
        if entropy and fields["entropy"] is None:
            raise ValueError(
                "Entropies were asked for, but the fused head was added without them: "
                'add_fused_lm_head(model, outputs=("log_probs", "entropy")).'
            )
        return {name: values for name, values in fields.items() if values is not None}
    logps, entropies = log_probs(output.logits[0], labels[0], temperature or 1.0, entropy)
    return {"log_probs": logps} if entropies is None else {"log_probs": logps, "entropy": entropies}


@contextmanager
def _gathered(backbone: nn.Module, packing: PackedRow) -> Iterator[None]:
    """While open, the backbone returns only the hidden states that make predictions, (1, M, hidden)."""
    calls = 0

    def gather(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        hidden = output[0]
        if hidden.shape[:2] != packing.input_ids.shape:
            raise SharedPrefixError(
                f"{type(module).__name__} returned hidden states {tuple(hidden.shape)} for a packed row "
                f"{tuple(packing.input_ids.shape)}. Turn shared prefixes off for this model."
            )
        picked = hidden.index_select(1, packing.predictors.to(hidden.device))
        if isinstance(output, tuple):
            return (picked, *output[1:])
        output.last_hidden_state = picked
        return output

    handle = backbone.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise SharedPrefixError(
            f"{type(backbone).__name__} was called {calls} times as a module in one forward, expected once. The head "
            "cannot be given the right hidden states; turn shared prefixes off for this model."
        )
