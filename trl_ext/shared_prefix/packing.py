"""Packing of rows into one packed row that holds every shared token once, and unpacking of the results.

Letters: `B` rows, `L` padded columns, `N` packed tokens, `M` scored predictions.

The trainer's rows are `[left padding, prompt, completion, right padding]`. The depth of a token is its index among the
real tokens of its row, and becomes its position id. For models that are not indifferent to left padding, its column in
the padded batch does (see `traits`).

A prediction consists of the hidden state that makes it, which is that of the token before, and the label that it is
scored on. Where rows part, one hidden state predicts a different token for each branch, so there can be more
predictions than tokens. They are therefore listed apart from the tokens: `predictors` names the packed tokens whose
hidden states go to the head, and `shift_labels` holds the label for each of them. In this way no token is repeated,
tokens that predict nothing never reach the head, and a prediction that rows share is scored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import BatchError
from .layout import CascadeLayout, layout_of
from .tree import MIN_RUN, IntArray, PrefixTree, common_prefix_length, tree_of_matrix, tree_of_neighbours

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class PackedRow:
    """Several rows packed into one, and which of its tokens make predictions.

    Attributes:
        input_ids: (1, N) the tokens of each node, in depth-first order of the nodes.
        position_ids: (1, N) the depth of each token in its own rows, or its column if packed `by_column`.
        predictors: (M,) index of the packed token whose hidden state makes each prediction.
        layout: Where the nodes lie, for the attention.
        tree: The prefix tree.
        dense_tokens: Number of positions that the dense path computes, padding included.
        row_tokens: Number of real tokens of all rows, each row up to its last predictor, shared tokens counted in each.
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
        """Returns `N`."""
        return self.layout.length

    @property
    def token_ratio(self) -> float:
        """Returns the number of dense positions per packed token, 1.0 if nothing is scored."""
        return self.dense_tokens / self.packed_tokens if self.packed_tokens else 1.0


@dataclass(frozen=True)
class Packing(PackedRow):
    """A packed micro-batch.

    Attributes:
        predictors: As in `PackedRow`. Predictions of packed tokens come first, in the order of these tokens.
        shift_labels: (1, M) label of each prediction.
        slots: (B, L) index of the prediction that scores the token in this place, `M` where nothing is scored.
        dense_tokens: `B * L`.
    """

    shift_labels: torch.Tensor
    slots: torch.Tensor

    @property
    def dense_pairs(self) -> int:
        """Returns the number of query-key pairs of causal attention over the padded rows."""
        rows, width = self.slots.shape
        return rows * width * (width + 1) // 2

    def unpack(self, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Brings one value per prediction back to the padded rows.

        Args:
            values: (1, M) or (M,), as the head returns them.
            start: First column wanted. A negative one counts from the end.

        Returns:
            (B, L - start) with zeros where nothing is scored, differentiable.
        """
        flat = values.reshape(-1)
        if flat.numel() != self.predictors.numel():
            raise ValueError(f"unpack expected {self.predictors.numel()} predictions, got {tuple(values.shape)}.")
        # The slot of a place without a prediction is M, which is the zero appended here.
        return torch.cat([flat, flat.new_zeros(1)])[self.slots[:, start:]]


def pack(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int | None = None,
    *,
    score_mask: torch.Tensor | None = None,
    min_run: int = MIN_RUN,
    by_column: bool = False,
) -> Packing:
    """Packs the padded rows of a micro-batch.

    Args:
        input_ids: (B, L) token ids, padded on the left, on the right, or on both sides.
        attention_mask: (B, L) 1 for real tokens, which must be contiguous in each row.
        logits_to_keep: Number of columns at the end that hold completions. Their real tokens are scored.
        score_mask: (B, L) instead of `logits_to_keep`: nonzero for the tokens to score. They must be real. Like TRL,
            this never scores the first column, which nothing predicts.
        min_run: Length of the shortest run of tokens that is shared.
        by_column: Whether the position of a token is its column instead of its depth. Rows then share tokens only if
            they have equally much padding on the left.

    Returns:
        The packing, on the device of `input_ids`. It leaves out rows without a scored token, and in each row the tokens
        after the last one that predicts something.

    Raises:
        BatchError: These rows cannot be packed.
    """
    check_shapes(input_ids, attention_mask, logits_to_keep, score_mask)
    device = input_ids.device
    if score_mask is None:
        assert logits_to_keep is not None
        score_mask = scored_completions(attention_mask, logits_to_keep)
    else:
        score_mask = without_first_column(score_mask)
    # A single transfer brings everything to the host. What follows is integer arithmetic in numpy.
    ids, real, scored = (
        torch.stack([input_ids, attention_mask.to(input_ids), score_mask.to(input_ids)]).cpu().numpy().astype(np.int64)
    )
    first_columns = _first_columns(real != 0, scored != 0)
    tokens, lengths = _left_aligned(ids, scored != 0, first_columns)
    offsets = first_columns if by_column else np.zeros_like(first_columns)
    tree = tree_of_matrix(_told_apart(tokens, offsets), lengths, min_run)
    layout = layout_of(tree)
    packed_ids, positions, packed_index = _place_tokens(tree, layout, tokens, offsets)
    predictors, labels, slots = _list_predictions(ids, scored != 0, first_columns, lengths, packed_index, layout.length)
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


def check_shapes(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    logits_to_keep: int | None,
    score_mask: torch.Tensor | None,
) -> None:
    """Raises a ValueError for arguments that do not fit together, whatever the rows hold."""
    if input_ids.dim() != 2 or input_ids.shape != attention_mask.shape:
        raise ValueError(
            f"input_ids and attention_mask must both be (B, L), got {tuple(input_ids.shape)} and "
            f"{tuple(attention_mask.shape)}."
        )
    if score_mask is None and (logits_to_keep is None or not 0 < logits_to_keep <= input_ids.shape[1]):
        raise ValueError(f"logits_to_keep must be in 1..{input_ids.shape[1]}, got {logits_to_keep}.")


def scored_completions(attention_mask: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
    """Returns a mask (B, L) of the real tokens in the last columns, which hold the completions."""
    score_mask = attention_mask.bool().clone()
    score_mask[:, :-logits_to_keep] = False
    return score_mask


def without_first_column(score_mask: torch.Tensor) -> torch.Tensor:
    """Returns the mask as booleans, with nothing scored in the first column."""
    score_mask = score_mask.bool().clone()
    score_mask[:, 0] = False
    return score_mask


def pack_answers(
    contexts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], device: torch.device
) -> PackedRow:
    """Packs contexts with answers behind them, and predicts each token of the answers, row after row.

    Contexts may have thousands of tokens in common, which would make a large padded matrix. So only neighbouring rows
    are compared, and no matrix is built.
    """
    # The last token of an answer is only predicted. It predicts nothing itself, so it is left out.
    rows = [[*context, *answer[:-1]] for context, answer in zip(contexts, answers, strict=True)]
    lengths = [len(row) for row in rows]
    tree = tree_of_neighbours(lengths, [0, *(common_prefix_length(a, b) for a, b in pairwise(rows))])
    layout = layout_of(tree)
    ids = [token for node in tree.nodes for token in rows[node.rows[0]][node.start : node.end]]
    depths = [depth for node in tree.nodes for depth in range(node.start, node.end)]
    predictors: list[int] = []
    for row, (context, answer) in enumerate(zip(contexts, answers, strict=True)):
        # The predictors are the last token of the context and all tokens of the answer but its last. They are found
        # from the end of the row upwards, as a node knows its parent and not its children.
        row_predictors, node = [], tree.row_node[row]
        for depth in range(len(context) + len(answer) - 2, len(context) - 2, -1):
            while depth < tree.nodes[node].start:
                node = tree.nodes[node].parent
            row_predictors.append(layout.bounds[node] + depth - tree.nodes[node].start)
        predictors += reversed(row_predictors)
    return PackedRow(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([depths], device=device),
        predictors=torch.tensor(predictors, device=device),
        layout=layout,
        tree=tree,
        dense_tokens=len(rows) * (max(lengths) + 1),
        row_tokens=sum(lengths),
    )


def _first_columns(real: BoolArray, scored: BoolArray) -> IntArray:
    """Returns the column of each row's first real token, (B,), after checking that each row can be packed."""
    first = real.argmax(axis=1)
    width = real.sum(axis=1)
    behind = real.shape[1] - real[:, ::-1].argmax(axis=1)  # the column behind the last real token
    for row in np.flatnonzero((behind - first != width) & (width > 0)):
        raise BatchError(
            f"Row {row} has padding between real tokens, so the depth of a token is not defined. Move all padding to "
            "the two ends (prompts padded left, completions padded right)."
        )
    for row in np.flatnonzero((scored & ~real).any(axis=1)):
        raise BatchError(f"Row {row} scores a padding token, but only real tokens can be scored.")
    rows = np.arange(len(first))
    for row in np.flatnonzero(scored[rows, first] & (width > 0)):
        raise BatchError(
            f"Row {row} scores its first real token, which no token of the row predicts. Is its prompt empty? Give it "
            "a prompt of at least one token, or turn shared prefixes off."
        )
    return first.astype(np.int64)


def _left_aligned(ids: IntArray, scored: BoolArray, first_columns: IntArray) -> tuple[IntArray, IntArray]:
    """Cuts each row behind its last token that predicts something.

    Returns:
        The tokens (B, longest), left-aligned, and the length of each row (B,).
    """
    width = ids.shape[1]
    # The last scored token is predicted by the one before it, so it need not be packed. That makes its depth, counted
    # from 0, the length of the row.
    last_scored = width - 1 - scored[:, ::-1].argmax(axis=1)
    lengths = np.where(scored.any(axis=1), last_scored - first_columns, 0).astype(np.int64)
    # Entries behind the length of a row are arbitrary. `minimum` only keeps their columns valid.
    columns = first_columns[:, None] + np.arange(int(lengths.max(initial=0)))[None]
    return np.take_along_axis(ids, np.minimum(columns, width - 1), axis=1), lengths


def _told_apart(tokens: IntArray, offsets: IntArray) -> IntArray:
    """Gives rows with other offsets another first token, for the comparison of rows alone."""
    if not tokens.size or not offsets.any():
        return tokens
    apart = tokens.copy()
    apart[:, 0] = apart[:, 0] * (int(offsets.max()) + 1) + offsets
    return apart


def _place_tokens(
    tree: PrefixTree, layout: CascadeLayout, tokens: IntArray, offsets: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Writes each node's tokens to its place in the packed row, and adds the offset of its rows to their positions.

    Returns:
        Packed token ids (N,), their positions (N,), and for each token (B, longest) of the rows its index in the packed
        row. Rows that share a token have the same index there.
    """
    packed_ids = np.empty(layout.length, dtype=np.int64)
    positions = np.empty(layout.length, dtype=np.int64)
    packed_index = np.zeros(tokens.shape, dtype=np.int64)
    for node, start in zip(tree.nodes, layout.bounds, strict=False):
        end = start + node.end - node.start
        packed_ids[start:end] = tokens[node.rows[0], node.start : node.end]
        positions[start:end] = np.arange(node.start, node.end) + offsets[node.rows[0]]
        packed_index[list(node.rows), node.start : node.end] = np.arange(start, end)
    return packed_ids, positions, packed_index


def _list_predictions(
    ids: IntArray,
    scored: BoolArray,
    first_columns: IntArray,
    lengths: IntArray,
    packed_index: IntArray,
    packed_tokens: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """Lists the distinct predictions of all rows.

    Returns:
        Predictors (M,), labels (M,) and slots (B, L), as described in `Packing`.
    """
    rows, columns = np.nonzero(scored)  # one entry per scored token
    depths = columns - first_columns[rows]
    # A prediction is identified by its target, the token that it predicts. Rows that share this token share the
    # prediction. The last scored token of a row is not packed, so it gets a number of its own behind all packed ones.
    is_packed = depths < lengths[rows]
    targets = rows
    if rows.size:
        targets = np.where(is_packed, packed_index[rows, np.where(is_packed, depths, 0)], packed_tokens + rows)
    # Mark the targets in use and number them consecutively. This is a sort in linear time that also removes duplicates.
    in_use = np.zeros(packed_tokens + len(lengths), dtype=bool)
    in_use[targets] = True
    slot_of_target = np.cumsum(in_use) - 1
    count = int(in_use.sum())
    slot_of_token = slot_of_target[targets]
    # Rows that share a prediction write the same values, so the order of writing does not matter.
    predictors = np.empty(count, dtype=np.int64)
    predictors[slot_of_token] = packed_index[rows, depths - 1]
    labels = np.empty(count, dtype=np.int64)
    labels[slot_of_token] = ids[rows, columns]
    slots = np.full(scored.shape, count, dtype=np.int64)
    slots[rows, columns] = slot_of_token
    return predictors, labels, slots
