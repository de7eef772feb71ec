"""Shared-prefix forward: log-probabilities of a padded micro-batch through one packed row. The function to call.

    logps, entropies, report = shared_prefix_logps(model, input_ids, attention_mask, logits_to_keep)

takes and returns what TRL's per-token log-probability forward takes and returns, for policy, old and reference models,
with the same gradients. It decides which of the two `paths` runs: the packed one where sharing is exact and saves
enough, otherwise the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import nn

from .errors import RefusedError, SharedPrefixError
from .model_parts import ModelParts
from .packing import pack
from .paths import dense_scores, packed_scores
from .refusals import why_not
from .selfcheck import check_first_use
from .tree import MIN_RUN

MIN_GAIN = 1.1


@dataclass(frozen=True)
class Report:
    """What one forward did.

    Attributes:
        packed: Whether the packed path ran.
        reason: Why the dense path ran instead, None if the packed path ran.
        dense_tokens: Positions of the padded batch.
        packed_tokens: Positions of the packed row.
        token_ratio: Dense tokens per packed token.
        scored: Predictions that go through the head on the packed path.
        levels: Levels of the prefix tree.
        backend: Name of the attention kernels, None on the dense path.
        pack_seconds: Time taken to build the tree and the indices.
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
    """Computes the log-probabilities of completion tokens, with each shared token computed once.

    Args:
        model: A causal language model of transformers, in any wrapper. With TRL's fused head it is called as
            `model(..., shift_labels=..., fused_lm_head=True)`. Otherwise its own head projects the scored positions.
        input_ids: (B, P + T) prompts padded on the left, completions padded on the right.
        attention_mask: (B, P + T) 1 for real tokens.
        logits_to_keep: `T`, the width of the completions.
        compute_entropy: Whether to return entropies. A fused head must have been added with them.
        temperature: Divides the logits, 1 if None. For a model with TRL's fused head, give the temperature that the
            head was added with, or None. If it is given, the packed path on a CPU uses the model's own head, which is
            faster there.
        backend: "flash_attn", "aten", "math", or None for the best that can serve.
        min_gain: The dense path runs if there are fewer dense tokens per packed token than this. With 0 the packed path
            always runs.
        min_run: Length of the shortest run of tokens to share.
        on_refusal: What to do if sharing would not be exact, or if the first-use check finds a difference: "error"
            raises the reason, "dense" runs the dense path and reports the reason.
        check: Whether to compare with the dense path on the first use of a model class, kernels and dtypes.

    Returns:
        Log-probabilities (B, T) with 0 at masked positions, entropies (B, T) or None, and a report.
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
    """Computes everything that the head returns for the tokens to score.

    It serves preference pairs too, whose rows are padded on the right only.

    Args:
        model: As in `shared_prefix_logps`, like all arguments that are not listed here.
        input_ids: (B, L).
        attention_mask: (B, L).
        score_mask: (B, L) nonzero for the tokens to score. Alternatively, give `logits_to_keep`.

    Returns:
        For each of TRL's per-token fields that the head computed ("log_probs", "entropy", "mean_logits", ...) a tensor
        (B, L), and a report. Column `j` holds the value for token `j`, or 0 if it is not scored. `[:, 1:]` is what the
        fused head returns for `labels`.
    """
    model_parts = ModelParts.of(model)
    started = perf_counter()
    packing = pack(input_ids, attention_mask, logits_to_keep, score_mask=score_mask, min_run=min_run)
    pack_seconds = perf_counter() - started
    reason, patch = None, None
    if not packing.packed_tokens:
        reason = "no token is scored"
    elif packing.token_ratio < min_gain:
        reason = f"{packing.token_ratio:.2f} dense tokens per packed token, fewer than min_gain={min_gain}"
    else:
        refusal = why_not(model_parts, packing)
        try:
            if refusal is not None:
                raise RefusedError(f"Shared prefixes refused: {refusal}")
            if check:
                check_first_use(model_parts, backend, temperature)
            scores, patch = packed_scores(
                model_parts, packing, compute_entropy=compute_entropy, temperature=temperature, backend=backend
            )
        except SharedPrefixError as error:
            if on_refusal == "error":
                raise
            reason = str(error)
    if reason is not None:
        scores = dense_scores(
            model_parts,
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
        backend=None if patch is None else patch.backend_name,
        pack_seconds=pack_seconds,
    )
    return scores, report
