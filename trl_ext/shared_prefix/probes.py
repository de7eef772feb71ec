"""Probes: what a model would answer now, asked without a gradient at many places of the same rows.

    forced = force_answers(model, contexts, answers)   # How likely is this answer after each context?
    sampled = sample_answers(model, contexts, draws)   # What does it answer, and how sure is it? (`sampled_probes`)

The contexts of a completion's steps are prefixes of one another, each followed by the text of the probe. In a prefix
tree, what they share is computed once, and exactly. Where a model cannot be shared, or the tree would save nothing,
each context runs by itself, and sampling goes through transformers' `generate`.

Probabilities and entropies are the model's own: over the whole vocabulary, at temperature 1, whatever head or
temperature a trainer has added. The model is in evaluation mode meanwhile. Its parameters, its gradients and every
random generator stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn

from .errors import RefusedError, SharedPrefixError
from .forward import MIN_GAIN
from .log_probs import token_log_probs
from .model_parts import ModelParts, evaluating
from .packing import PackedRow, pack_answers
from .paths import packed_logits
from .refusals import why_not
from .selfcheck import check_first_use
from .tree import common_prefix_length

Tokens = Sequence[int]
Sharing = Literal["auto", "always", "never"]


@dataclass
class ProbeCost:
    """What probing took.

    Attributes:
        row_tokens: Tokens of all rows, shared tokens counted in each row.
        computed_tokens: Positions that were computed, packed or padded.
        forwards: Calls of the model.
        dense_forwards: Those of them without a tree.
        refusal: Why the tree could not be used, the last time that it was wanted and refused.
    """

    row_tokens: int = 0
    computed_tokens: int = 0
    forwards: int = 0
    dense_forwards: int = 0
    refusal: str | None = None

    def __add__(self, other: ProbeCost) -> ProbeCost:
        return ProbeCost(
            self.row_tokens + other.row_tokens,
            self.computed_tokens + other.computed_tokens,
            self.forwards + other.forwards,
            self.dense_forwards + other.dense_forwards,
            self.refusal or other.refusal,
        )

    def count(self, tokens: int, computed: int, dense: bool, forwards: int = 1) -> None:
        """Adds calls of the model to the totals."""
        self.row_tokens += tokens
        self.computed_tokens += computed
        self.forwards += forwards
        self.dense_forwards += forwards * dense


@dataclass(frozen=True)
class Answers:
    """Answers after contexts, in the order of the contexts.

    Attributes:
        tokens: Token ids of each answer. A sampled answer lacks the token that ended it.
        logps: For each answer, the log-probabilities of its tokens, (tokens,) in float32 or wider.
        entropies: For each answer, the entropies of the distributions that predict its tokens, (tokens,).
        cost: What it took.
    """

    tokens: list[list[int]]
    logps: list[torch.Tensor]
    entropies: list[torch.Tensor]
    cost: ProbeCost = field(default_factory=ProbeCost)


def force_answers(
    model: nn.Module,
    contexts: Sequence[Tokens],
    answers: Sequence[Tokens],
    *,
    shared: Sharing = "auto",
    batch_tokens: int = 16384,
    backend: str | None = None,
) -> Answers:
    """Computes how likely each answer is after its context.

    Args:
        model: A causal language model of transformers in any wrapper, with all its parameters on this process.
        contexts: Token ids, none empty. Contexts that share much should be next to each other.
        answers: Token ids of one answer for each context, none empty.
        shared: Whether to use the prefix tree: "auto" where it is exact and saves something, "always", which raises the
            reason where it is not exact, or "never".
        batch_tokens: Positions per forward, roughly. A longer row gets a forward of its own.
        backend: Kernels for the tree, None for the best that can serve.
    """
    model_parts = ModelParts.of(model)
    check_probes(model_parts, contexts, answers)
    cost = ProbeCost()
    logps: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    longest_answer = max(map(len, answers), default=0)
    for batch in batches(contexts, batch_tokens, shared != "never", reserve=longest_answer):
        batch_answers = answers[batch]
        logits = answer_logits(model_parts, contexts[batch], batch_answers, shared, backend, cost)
        labels = torch.tensor([token for answer in batch_answers for token in answer], device=logits.device)
        token_logps, token_entropies = token_log_probs(logits, labels, entropy=True)
        assert token_entropies is not None
        lengths = [len(answer) for answer in batch_answers]
        logps += token_logps.split(lengths)
        entropies += token_entropies.split(lengths)
    return Answers([list(answer) for answer in answers], logps, entropies, cost)


def check_probes(model_parts: ModelParts, contexts: Sequence[Tokens], answers: Sequence[Tokens] | torch.Tensor) -> None:
    """Refuses rows that cannot be asked about, and models that one process alone cannot call.

    Args:
        model_parts: The model.
        contexts: Token ids of each context.
        answers: Token ids of each answer, or draws (contexts, tokens).
    """
    if len(contexts) != len(answers):
        raise ValueError(f"{len(contexts)} contexts came with {len(answers)} answers or draws, expected one for each.")
    if not all(map(len, contexts)) or (not torch.is_tensor(answers) and not all(map(len, answers))):
        raise ValueError("A context or an answer is empty. Both need at least one token.")
    if model_parts.is_sharded:
        raise RefusedError(
            "Probes need all parameters on each process, but this model's are sharded (FSDP, DeepSpeed stage 3): all "
            "processes would have to call it equally often. Train with DDP or DeepSpeed stage 2."
        )


def batches(rows: Sequence[Tokens], batch_tokens: int, shared: bool, reserve: int = 0) -> Iterator[slice]:
    """Splits the rows into runs of neighbours, each of which fits into a forward.

    Args:
        rows: Token ids of each row.
        batch_tokens: Positions of one forward. A longer row gets a batch of its own.
        shared: Whether the rows become a tree, in which a row adds only what it does not share with the row before.
            Otherwise they are padded to the longest one.
        reserve: Tokens that each row may still grow by.
    """
    start, tokens, longest = 0, 0, 0
    for number, row in enumerate(rows):
        length = len(row) + reserve
        longest = max(longest, length)
        if not shared:
            tokens = (number + 1 - start) * longest
        else:
            # The first row of a batch shares nothing with what is in it.
            tokens += length - (common_prefix_length(rows[number - 1], row) if number > start else 0)
        if tokens > batch_tokens and number > start:
            yield slice(start, number)
            start, longest, tokens = number, length, length
    if start < len(rows):
        yield slice(start, len(rows))


def answer_logits(
    model_parts: ModelParts,
    contexts: Sequence[Tokens],
    answers: Sequence[Tokens],
    shared: Sharing,
    backend: str | None,
    cost: ProbeCost,
) -> torch.Tensor:
    """Computes the logits that predict the tokens of all answers, (tokens of all answers, vocabulary)."""
    tokens = sum(len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True))
    if shared != "never":
        packing = pack_answers(contexts, answers, model_parts.device)
        if tree_is_usable(model_parts, packing, shared, backend, cost):
            with torch.no_grad(), evaluating(model_parts):
                logits = packed_logits(model_parts, packing, backend)
            cost.count(tokens, packing.packed_tokens, dense=False)
            return logits
    logits, computed = _dense_logits(model_parts, contexts, answers)
    cost.count(tokens, computed, dense=True)
    return logits


def tree_is_usable(
    model_parts: ModelParts, packing: PackedRow, shared: Sharing, backend: str | None, cost: ProbeCost
) -> bool:
    """Returns whether to use the tree. If it is refused, the cost keeps the reason, or "always" raises it."""
    if shared == "auto" and packing.token_ratio < MIN_GAIN:
        return False
    with evaluating(model_parts):  # as it will run, so that dropout is no reason to refuse
        reason = why_not(model_parts, longest=packing.layout.longest + 1)
    try:
        if reason is not None:
            raise RefusedError(f"Shared prefixes refused: {reason}")
        check_first_use(model_parts, backend, padded=False)  # contexts have no padding, so depths are columns
    except SharedPrefixError as error:
        if shared == "always":
            raise
        cost.refusal = str(error)
        return False
    return True


def left_padded(rows: Sequence[Tokens], device: torch.device) -> dict[str, torch.Tensor]:
    """Pads rows on the left and returns them as a model takes them."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _dense_logits(
    model_parts: ModelParts, contexts: Sequence[Tokens], answers: Sequence[Tokens]
) -> tuple[torch.Tensor, int]:
    """Runs every row by itself, padded on the left so that all answers stand at the end.

    Returns:
        The logits, as `answer_logits` does, and the number of positions computed.
    """
    rows = [[*context, *answer] for context, answer in zip(contexts, answers, strict=True)]
    inputs = left_padded(rows, model_parts.device)
    accepted = signature(type(model_parts.causal_lm).forward).parameters
    longest_answer = max(map(len, answers))
    # The logits of the last token of the contexts are needed too: they predict the first tokens of the answers.
    keep = longest_answer + 1
    optional: dict[str, Any] = {"use_cache": False}
    if "position_ids" in accepted:
        optional["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        optional["logits_to_keep"] = keep
    with torch.no_grad(), evaluating(model_parts):
        logits = model_parts.model(**inputs, **optional).logits[:, -keep:-1]  # (B, longest answer, vocabulary)
    # A shorter answer has logits of its context before its own.
    predicts_answer = torch.tensor(
        [[column >= longest_answer - len(answer) for column in range(longest_answer)] for answer in answers]
    )
    return logits[predicts_answer.to(logits.device)], inputs["input_ids"].numel()
