"""Packs a padded micro-batch into one row that holds every shared token once, and unpacks the results.

Letters: `B` rows, `L` padded columns, `N` packed tokens, `M` scored predictions.

The trainer's rows are `[left padding, prompt, completion, right padding]`. A token at depth `d` of its row gets
position `d`. A prediction is the pair (hidden state of the token before, label). Where rows part, one hidden state
predicts a different token for each child; so the predictions are listed apart from the tokens: `predictors` picks the
hidden states to project, `shift_labels` has the token that each of them is scored on. No token is repeated, tokens
without a scored prediction never reach the head, and predictions that rows share are scored once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .layout import CascadeLayout, layout_of
from .tree import MIN_RUN, IntArray, PrefixTree, tree_of


@dataclass(frozen=True)
class PackedRow:
    """Rows packed into one, and the places that predict something.

    Attributes:
        input_ids: (1, N) each node's tokens in depth-first order.
        position_ids: (1, N) depth of every token in its own rows.
        predictors: (M,) the packed token whose hidden state makes each prediction.
        layout: What the attention needs.
        tree: The prefix tree.
        dense_tokens: The positions that the dense path computes, padding included.
        row_tokens: Real tokens of all rows up to the last one that predicts, each row for itself.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predictors: torch.Tensor
    layout: CascadeLayout
    tree: PrefixTree
    dense_tokens: int
    row_tokens: int

    @property
    def packed_tokens(self) -> int:
        """`N`."""
        return self.layout.length

    @property
    def token_ratio(self) -> float:
        """Dense positions for each packed token; 1.0 if nothing is scored."""
        return self.dense_tokens / self.packed_tokens if self.packed_tokens else 1.0


@dataclass(frozen=True)
class Packing(PackedRow):
    """A packed micro-batch.

    Attributes:
        predictors: As above, ascending within the shared part.
        shift_labels: (1, M) the label of each prediction.
        slots: (B, L) which prediction scores the token at this place; M where nothing is scored.
        dense_tokens: `B * L`.
    """

    shift_labels: torch.Tensor
    slots: torch.Tensor

    @property
    def dense_pairs(self) -> int:
        """Query-key pairs of causal attention over the padded rows."""
        rows, width = self.slots.shape
        return rows * width * (width + 1) // 2

    def unpack(self, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Brings one value for each prediction, (1, M) or (M,), back to its place: (B, L), zeros elsewhere.

        Args:
            values: What the head returned.
            start: First column wanted; negative counts from the end.
        """
        flat = values.reshape(-1)
        if flat.numel() != self.predictors.numel():
            raise ValueError(f"unpack expected {self.predictors.numel()} predictions, got {tuple(values.shape)}.")
        return torch.cat([flat, flat.new_zeros(1)])[self.slots[:, start:]]


def pack(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int | None = None,
    *,
    score_mask: torch.Tensor | None = None,
    min_run: int = MIN_RUN,
) -> Packing:
    """Packs padded rows.

    Args:
        input_ids: (B, L) token ids, padded on the left, the right or both.
        attention_mask: (B, L) 1 for real tokens; they must be contiguous in each row.
        logits_to_keep: The last columns are completions: their real tokens are scored. None: see `score_mask`.
        score_mask: (B, L) instead, nonzero for the tokens to score, all real and none the first of its row.
        min_run: Shortest run of tokens that is shared.

    Returns:
        The packing, on the device of `input_ids`. A row without a scored token is left out; tokens behind the last
        one that predicts are left out.
    """
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids and attention_mask must both be (B, L), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}."
        )
    device = input_ids.device
    if score_mask is None:
        if logits_to_keep is None or not 0 < logits_to_keep <= input_ids.shape[1]:
            raise ValueError(f"logits_to_keep must be in 1..{input_ids.shape[1]}, got {logits_to_keep}.")
        score_mask = attention_mask.bool().clone()
        score_mask[:, :-logits_to_keep] = False
    # One transfer; the rest is integer work on the host.
    ids, real, score = (
        torch.stack([input_ids, attention_mask.to(input_ids), score_mask.to(input_ids)]).cpu().numpy().astype(np.int64)
    )
    first = _first_columns(real != 0, score != 0)
    tokens, lengths = _left_aligned(ids, score != 0, first)
    tree = tree_of(tokens, lengths, min_run)
    layout = layout_of(tree)
    packed_ids, positions, where = _place(tree, layout, tokens)
    predictors, labels, slots = _predictions(ids, score != 0, first, lengths, where, layout.length)
    return Packing(
        input_ids=torch.from_numpy(packed_ids)[None].to(device),
        position_ids=torch.from_numpy(positions)[None].to(device),
        predictors=torch.from_numpy(predictors).to(device),
        shift_labels=torch.from_numpy(labels)[None].to(device),
        slots=torch.from_numpy(slots).to(device),
        layout=layout,
        tree=tree,
        dense_tokens=int(ids.size),
        row_tokens=int(lengths.sum()),
    )


def _first_columns(real: np.ndarray, score: np.ndarray) -> IntArray:
    """Column of each row's first real token, after checking that the row can be packed."""
    first = real.argmax(axis=1)
    width = real.sum(axis=1)
    last = real.shape[1] - real[:, ::-1].argmax(axis=1)
    for row in np.flatnonzero((last - first != width) & (width > 0)):
        raise ValueError(
            f"Row {row} has padding between real tokens, so the depth of a token is not defined. Move all padding to "
            "the two ends (prompts padded left, completions padded right)."
        )
    for row in np.flatnonzero((score & ~real).any(axis=1)):
        raise ValueError(f"Row {row} scores a padding token: the tokens to score must be real.")
    rows = np.arange(len(first))
    for row in np.flatnonzero(score[rows, first] & (width > 0)):
        raise ValueError(f"Row {row} scores its first real token, which no token predicts. Is its prompt empty?")
    return first.astype(np.int64)


def _left_aligned(ids: IntArray, score: np.ndarray, first: IntArray) -> tuple[IntArray, IntArray]:
    """Tokens (B, longest) of each row up to the last one that predicts, and their number (B,)."""
    width = ids.shape[1]
    last = width - 1 - score[:, ::-1].argmax(axis=1)  # column of the last scored token; the one before predicts it
    lengths = np.where(score.any(axis=1), last - first, 0).astype(np.int64)
    columns = first[:, None] + np.arange(int(lengths.max(initial=0)))[None]
    return np.take_along_axis(ids, np.minimum(columns, width - 1), axis=1), lengths


def _place(tree: PrefixTree, layout: CascadeLayout, tokens: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Packed ids (N,) and positions (N,), and where each token (B, longest) of each row went."""
    packed = np.empty(layout.length, dtype=np.int64)
    positions = np.empty(layout.length, dtype=np.int64)
    where = np.zeros(tokens.shape, dtype=np.int64)
    for node, start in zip(tree.nodes, layout.bounds, strict=False):
        end = start + node.end - node.start
        packed[start:end] = tokens[node.rows[0], node.start : node.end]
        positions[start:end] = np.arange(node.start, node.end)
        where[list(node.rows), node.start : node.end] = np.arange(start, end)
    return packed, positions, where


def _predictions(
    ids: IntArray, score: np.ndarray, first: IntArray, lengths: IntArray, where: IntArray, total: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Predictors (M,), labels (M,) and slots (B, L).

    A prediction is named by its target: the target's place in the packed row, or for the last token of a row, which is
    not packed, a place of the row's own behind all of them. Marking the places and counting them is a sort in linear
    time that also unites the predictions that rows share.
    """
    rows, columns = np.nonzero(score)
    depth = columns - first[rows]
    packed = depth < lengths[rows]
    target = np.where(packed, where[rows, np.where(packed, depth, 0)], total + rows) if rows.size else rows
    used = np.zeros(total + len(lengths), dtype=bool)
    used[target] = True
    number = np.cumsum(used) - 1
    count = int(used.sum())
    slot = number[target]
    predictors = np.empty(count, dtype=np.int64)
    labels = np.empty(count, dtype=np.int64)
    predictors[slot] = where[rows, depth - 1]
    labels[slot] = ids[rows, columns]
    slots = np.full(score.shape, count, dtype=np.int64)
    slots[rows, columns] = slot
    return predictors, labels, slots
