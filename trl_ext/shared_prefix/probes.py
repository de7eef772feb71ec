"""Probes: what a model would answer now, asked at many places of the same rows without a gradient.

    forced = force_answers(model, contexts, answers)     # how likely is this answer behind each context?
    drawn = sample_answers(model, contexts, draws)        # what does it answer, and how sure is it? (`draws`)

The contexts of a completion's steps are prefixes of one another, with the probe's text behind each. As a prefix tree
they are computed once, exactly; where a model cannot be shared, or the tree would save nothing, each context runs for
itself (and sampling goes through transformers' `generate`). Probabilities and entropies are the model's own: of the
whole vocabulary, at temperature 1, whatever head or temperature a trainer has added. The model is in evaluation mode
meanwhile; its parameters, gradients and every random generator stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn

from . import selfcheck
from .errors import RefusedError, SharedPrefixError
from .forward import MIN_GAIN, packed_logits
from .layout import layout_of
from .log_probs import log_probs
from .model_parts import evaluating, find_causal_lm, model_device
from .packing import PackedRow
from .refusals import why_not
from .tree import tree_of_neighbours

Tokens = Sequence[int]
Sharing = Literal["auto", "always", "never"]


@dataclass
class ProbeCost:
    """What probing took.

    Attributes:
        row_tokens: Tokens of all rows, each row for itself.
        computed_tokens: Positions that were computed: packed ones, or those of padded rows.
        forwards: Calls of the model.
        dense_forwards: Those without a tree.
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
        self.row_tokens += tokens
        self.computed_tokens += computed
        self.forwards += forwards
        self.dense_forwards += forwards * dense


@dataclass(frozen=True)
class Answers:
    """Answers behind contexts, in the order of the contexts.

    Attributes:
        tokens: Token ids of each answer: those asked about, or drawn without the token that ends it.
        logps: For each answer the log-probabilities of its tokens, (M,) float32 or wider.
        entropies: For each answer the entropies of the distributions that predict its tokens, (M,).
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
    """How likely each answer is behind its context.

    Args:
        model: A causal language model of transformers in any wrapper, with all its parameters on this process.
        contexts: Token ids, none empty. Neighbours that share much should stand together.
        answers: As many, token ids, none empty.
        shared: Use the prefix tree where that is exact, always (refused with the reason where it is not), or never.
        batch_tokens: Positions of one forward, roughly; a longer row gets a forward of its own.
        backend: Kernels of the tree, None for the best that run.
    """
    check(model, contexts, answers)
    cost = ProbeCost()
    logps: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    longest = max(map(len, answers), default=0)
    for batch in batches(contexts, batch_tokens, shared != "never", spare=longest):
        wanted = answers[batch]
        logits = answer_logits(model, contexts[batch], wanted, shared, backend, cost)
        labels = torch.tensor([token for answer in wanted for token in answer], device=logits.device)
        values, spread = log_probs(logits, labels, 1.0, entropy=True)
        assert spread is not None
        sizes = [len(answer) for answer in wanted]
        logps += values.split(sizes)
        entropies += spread.split(sizes)
    return Answers([list(answer) for answer in answers], logps, entropies, cost)


# --- rows and batches -------------------------------------------------------------------------------------------------


def check(model: nn.Module, contexts: Sequence[Tokens], others: Any) -> None:
    """Refuses rows that cannot be asked about, and models that some processes alone cannot call."""
    if len(contexts) != len(others):
        raise ValueError(f"{len(contexts)} contexts came with {len(others)} answers or draws; expected one for each.")
    if not all(len(context) for context in contexts) or (not torch.is_tensor(others) and not all(map(len, others))):
        raise ValueError("A context or an answer is empty; both need at least one token.")
    if any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters()):
        raise RefusedError(
            "Probes need all parameters on each process, and this model's are sharded (FSDP, DeepSpeed stage 3): its "
            "processes would have to call it equally often. Train with DDP or DeepSpeed stage 2."
        )


def batches(rows: Sequence[Tokens], most: int, shared: bool, spare: int = 0) -> Iterator[slice]:
    """Runs of neighbouring rows that fit into a forward, by what each adds to the tree or to the padded batch."""
    start, tokens, longest = 0, 0, 0
    for number, row in enumerate(rows):
        fresh = len(row) - (_common(rows[number - 1], row) if shared and number > start else 0) + spare
        longest = max(longest, len(row) + spare)
        tokens = tokens + fresh if shared else (number + 1 - start) * longest
        if tokens > most and number > start:
            yield slice(start, number)
            start, longest = number, len(row) + spare
            tokens = longest
    if start < len(rows):
        yield slice(start, len(rows))


def _common(left: Tokens, right: Tokens) -> int:
    """How many tokens at the beginning are equal, by halving: slices compare faster than single tokens."""
    equal, most = 0, min(len(left), len(right))
    while equal < most:
        middle = (equal + most + 1) // 2
        if left[equal:middle] == right[equal:middle]:
            equal = middle
        else:
            most = middle - 1
    return equal


def packed_rows(contexts: Sequence[Tokens], answers: Sequence[Tokens], device: torch.device) -> PackedRow:
    """The tree of the rows, with a prediction for each token of the answers, row after row.

    Thousands of tokens that rows share would make a large padded matrix, so neighbours are compared instead.
    """
    # the last token of a row predicts nothing
    rows = [list(context) + list(answer[:-1]) for context, answer in zip(contexts, answers, strict=True)]
    lengths = [len(row) for row in rows]
    tree = tree_of_neighbours(lengths, [0, *(_common(a, b) for a, b in pairwise(rows))])
    layout = layout_of(tree)
    ids = [token for node in tree.nodes for token in rows[node.rows[0]][node.start : node.end]]
    depths = [depth for node in tree.nodes for depth in range(node.start, node.end)]
    predictors: list[int] = []
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        own, number = [], tree.row_node[row]
        for depth in range(len(context) + len(answer) - 2, len(context) - 2, -1):
            while depth < tree.nodes[number].start:
                number = tree.nodes[number].parent
            own.append(layout.bounds[number] + depth - tree.nodes[number].start)
        predictors += own[::-1]
    return PackedRow(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([depths], device=device),
        predictors=torch.tensor(predictors, device=device),
        layout=layout,
        tree=tree,
        dense_tokens=len(rows) * (max(lengths) + 1),
        row_tokens=sum(lengths),
    )


# --- one forward ------------------------------------------------------------------------------------------------------


def answer_logits(
    model: nn.Module,
    contexts: Sequence[Tokens],
    answers: Sequence[Tokens],
    shared: Sharing,
    backend: str | None,
    cost: ProbeCost,
) -> torch.Tensor:
    """(tokens of all answers, vocabulary): what predicts each of them."""
    tokens = sum(len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True))
    if shared != "never":
        packing = packed_rows(contexts, answers, model_device(model))
        if usable(model, packing, shared, backend, cost):
            with torch.no_grad(), evaluating(model):
                logits = packed_logits(model, packing, backend)
            cost.count(tokens, packing.packed_tokens, dense=False)
            return logits
    logits, computed = _dense_logits(model, contexts, answers)
    cost.count(tokens, computed, dense=True)
    return logits


def usable(model: nn.Module, packing: PackedRow, shared: Sharing, backend: str | None, cost: ProbeCost) -> bool:
    """Whether the tree is to be used; where it was refused, the reason is kept."""
    if shared == "auto" and packing.token_ratio < MIN_GAIN:
        return False
    with evaluating(model):  # as it will run: dropout does not count
        reason = why_not(model, longest=packing.layout.longest + 1)
    try:
        if reason is not None:
            raise RefusedError(f"Shared prefixes refused: {reason}")
        selfcheck.ensure(model, backend)
    except SharedPrefixError as error:
        if shared == "always":
            raise
        cost.refusal = str(error)
        return False
    return True


def _dense_logits(model: nn.Module, contexts: Sequence[Tokens], answers: Sequence[Tokens]) -> tuple[torch.Tensor, int]:
    """Every row for itself, padded on the left so that all answers stand at the end."""
    inputs = left_padded([[*c, *a] for c, a in zip(contexts, answers, strict=True)], model_device(model))
    accepted = signature(type(find_causal_lm(model)).forward).parameters
    keep = max(map(len, answers)) + 1
    extra: dict[str, Any] = {"use_cache": False}
    if "position_ids" in accepted:
        extra["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = keep
    with torch.no_grad(), evaluating(model):
        logits = model(**inputs, **extra).logits[:, -keep:-1]  # (B, longest answer, vocabulary)
    own = torch.tensor([[i >= keep - 1 - len(answer) for i in range(keep - 1)] for answer in answers])
    return logits[own.to(logits.device)], inputs["input_ids"].numel()


def left_padded(rows: Sequence[Tokens], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows as a model takes them, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}
