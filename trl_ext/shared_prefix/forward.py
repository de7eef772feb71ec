"""Shared-prefix forward: log-probabilities of a padded micro-batch through one packed row. The function to call.

    logps, entropies, report = shared_prefix_logps(model, input_ids, attention_mask, logits_to_keep)

takes and returns what TRL's per-token log-probability forward takes and returns, for policy, old and reference models,
with the same gradients. It decides which of the two `paths` runs: the packed one where sharing is exact and saves
enough, otherwise the dense one.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from .errors import RefusedError, SharedPrefixError
from .model_parts import ModelParts
from .packing import Packing, check_shapes, pack, scored_completions, without_first_column
from .paths import dense_scores, packed_scores
from .selfcheck import check_first_use
from .traits import positions_are_columns, why_noisy, why_not_at_all
from .tree import MIN_RUN

MIN_GAIN = 1.1
_SAMPLE = 8  # tokens of the run that take part in the first-use check


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
        check: Whether to look for noise and to compare with the dense path on the first use of a kind of model,
            kernels and dtypes.

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
    request = _Request(model_parts, input_ids, attention_mask, logits_to_keep, score_mask, min_run)
    packing, reason, patch, pack_seconds = None, None, None, 0.0
    try:
        if model_parts.is_sharded:
            # Every check calls the model, which all processes must do equally often, whatever their batches.
            request.check_model(backend, temperature, check)
        packing, pack_seconds = request.pack(by_column=False)
        reason = _too_little_gain(packing, min_gain)
        if reason is None:
            refusal = why_not_at_all(model_parts, packing, run=check)
            if refusal is not None:
                raise RefusedError(f"Shared prefixes refused: {refusal}")
            if request.check_model(backend, temperature, check):
                packing, pack_seconds = request.pack(by_column=True)
                reason = _too_little_gain(packing, min_gain)
        if reason is None:
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
            request.score_mask,
            compute_entropy=compute_entropy,
            temperature=temperature,
        )
    report = Report(
        packed=reason is None,
        reason=reason,
        dense_tokens=input_ids.numel(),
        packed_tokens=0 if packing is None else packing.packed_tokens,
        token_ratio=1.0 if packing is None else packing.token_ratio,
        scored=int(request.score_mask.sum()) if packing is None else packing.predictors.numel(),
        levels=0 if packing is None else packing.tree.depth,
        backend=None if patch is None else patch.backend_name,
        pack_seconds=pack_seconds,
    )
    return scores, report


def _too_little_gain(packing: Packing, min_gain: float) -> str | None:
    """Returns why packing is not worth it, None if it is."""
    if not packing.packed_tokens:
        return "no token is scored"
    if packing.token_ratio < min_gain:
        return f"{packing.token_ratio:.2f} dense tokens per packed token, fewer than min_gain={min_gain}"
    return None


class _Request:
    """The rows to score, and the model that scores them.

    Attributes:
        score_mask: (B, L) true for the tokens to score.
    """

    def __init__(
        self,
        model_parts: ModelParts,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int | None,
        score_mask: torch.Tensor | None,
        min_run: int,
    ) -> None:
        check_shapes(input_ids, attention_mask, logits_to_keep, score_mask)
        self._model_parts = model_parts
        self._input_ids, self._attention_mask = input_ids, attention_mask
        self._min_run = min_run
        if score_mask is not None:
            self.score_mask = without_first_column(score_mask)
        else:
            assert logits_to_keep is not None
            self.score_mask = scored_completions(attention_mask, logits_to_keep)
        self._rows = {"logits_to_keep": logits_to_keep} if score_mask is None else {"score_mask": score_mask}

    def pack(self, by_column: bool) -> tuple[Packing, float]:
        """Packs the rows. Returns the packing and the time taken."""
        started = perf_counter()
        rows: Any = self._rows
        packing = pack(self._input_ids, self._attention_mask, min_run=self._min_run, by_column=by_column, **rows)
        return packing, perf_counter() - started

    def check_model(self, backend: str | None, temperature: float | None, check: bool) -> bool:
        """Makes sure that the model can be shared on these rows. Returns whether they must be packed by column.

        Args:
            backend: As in `shared_prefix_logps`, like `temperature`.
            check: With False only the positions are looked into, as packing needs to know them.

        Raises:
            SharedPrefixError: It cannot be shared.
        """
        model_parts = self._model_parts
        # Without padding on the left, columns are depths for all models.
        padded = model_parts.is_sharded or bool((self._attention_mask[:, 0] == 0).any())
        by_column = padded and positions_are_columns(model_parts, self._input_ids.shape[1])
        if check:
            noise = why_noisy(model_parts) if model_parts.is_sharded else None
            if noise is not None:
                raise RefusedError(f"Shared prefixes refused: {model_parts.class_name} {noise}")
            check_first_use(
                model_parts, backend, temperature, padded=padded, by_column=by_column, sample=self._before_completion()
            )
        return by_column

    def _before_completion(self) -> list[int]:
        """Returns the last tokens before the first completion, such as those of a chat template."""
        places = self.score_mask.nonzero()
        if not len(places):
            return []
        row, column = places[0].tolist()
        before = slice(max(0, column - _SAMPLE), column)
        real = self._attention_mask[row, before].bool()
        tokens: list[int] = self._input_ids[row, before][real].tolist()
        return tokens
