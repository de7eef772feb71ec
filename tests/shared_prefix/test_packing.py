"""Packing and unpacking, compared with the padded rows read one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext.shared_prefix import BatchError, RefusedError, pack

from .conftest import random_tokens

Batch = tuple[torch.Tensor, torch.Tensor, int]


def rows_of(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), min_run=st.integers(1, 5))
def test_every_completion_token_is_predicted_from_its_own_row(seed: int, min_run: int) -> None:
    rng = random.Random(seed)
    batch = []
    for _ in range(rng.randrange(1, 4)):
        prompt = [rng.randrange(1, 4) for _ in range(rng.randrange(1, 8))]
        batch += [(prompt, [rng.randrange(1, 3) for _ in range(rng.randrange(0, 6))]) for _ in range(3)]
    width = max(1, max(len(c) for _, c in batch))
    left = max(len(p) for p, _ in batch)
    ids, mask = torch.zeros(len(batch), left + width, dtype=torch.long), torch.zeros(len(batch), left + width)
    for i, (prompt, completion) in enumerate(batch):
        row = torch.tensor(prompt + completion)
        ids[i, left - len(prompt) : left + len(completion)] = row
        mask[i, left - len(prompt) : left + len(completion)] = 1
    packing = pack(ids, mask, width, min_run=min_run)
    seen = _visible(packing)
    labels, predictors = packing.shift_labels[0].tolist(), packing.predictors.tolist()
    for i, (prompt, completion) in enumerate(batch):
        row = prompt + completion
        for column in range(ids.shape[1]):
            slot = int(packing.slots[i, column])
            depth = column - left + len(prompt)
            if column < left or depth >= len(row):
                assert slot == len(labels)  # nothing is scored here
                continue
            assert labels[slot] == row[depth]
            assert seen[predictors[slot]] == row[:depth]
            assert int(packing.position_ids[0, predictors[slot]]) == depth - 1


def _visible(packing: Any) -> list[list[int]]:
    """Returns the tokens that each packed token sees, itself included, in order."""
    seen: list[list[int]] = []
    last: dict[int, list[int]] = {-1: []}
    ids = packing.input_ids[0].tolist()
    for i, node in enumerate(packing.tree.nodes):
        path = list(last[node.parent])
        for at in range(packing.layout.bounds[i], packing.layout.bounds[i + 1]):
            path = [*path, ids[at]]
            seen.append(path)
        last[i] = path
    return seen


def test_a_group_costs_its_prompt_once(padded: Callable[..., Batch]) -> None:
    prompt = list(range(3, 35))
    ids, mask, width = padded([(prompt, [40 + i] * 8) for i in range(4)])
    packing = pack(ids, mask, width)
    # The last token of a completion predicts nothing, so it is not packed.
    assert packing.packed_tokens == 32 + 4 * 7
    assert packing.dense_tokens == 4 * 40
    assert packing.row_tokens == 4 * 39
    assert packing.token_ratio == pytest.approx(160 / 60)
    assert packing.predictors.numel() == 4 * 8
    assert packing.position_ids[0, 32:39].tolist() == list(range(32, 39))
    assert packing.tree.depth == 2


def test_unpack_puts_values_in_place_and_carries_gradients(groups: Batch) -> None:
    ids, mask, width = groups
    packing = pack(ids, mask, width)
    values = packing.shift_labels.double().requires_grad_()
    back = packing.unpack(values, start=-width)
    wanted = torch.where(mask[:, -width:].bool(), ids[:, -width:], 0).double()
    assert torch.equal(back, wanted)
    back.sum().backward()
    assert values.grad is not None
    assert values.grad.sum() == mask[:, -width:].sum()


def test_equal_completions_are_scored_once_and_unpacked_twice(padded: Callable[..., Batch]) -> None:
    prompt = list(range(3, 30))
    ids, mask, width = padded([(prompt, [5, 6, 7]), (prompt, [5, 6, 7])])
    packing = pack(ids, mask, width)
    assert packing.packed_tokens == len(prompt) + 2
    values = torch.arange(packing.predictors.numel(), dtype=torch.float32, requires_grad=True)
    both = packing.unpack(values, start=-width)
    assert torch.equal(both[0, :2], both[1, :2])
    both.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [2.0, 2.0, 1.0, 1.0]  # the last tokens are predicted row by row


def test_rows_without_scored_tokens_are_left_out(padded: Callable[..., Batch]) -> None:
    ids, mask, width = padded([(list(range(3, 30)), [4, 5]), (list(range(30, 40)), [])])
    packing = pack(ids, mask, width)
    assert packing.packed_tokens == 28
    assert packing.unpack(torch.ones(packing.predictors.numel()))[1].sum() == 0


def test_nothing_scored_at_all(padded: Callable[..., Batch]) -> None:
    ids, mask, _ = padded([([3, 4], []), ([3, 4], [])])
    packing = pack(ids, mask, score_mask=torch.zeros_like(ids))
    assert packing.packed_tokens == 0
    assert packing.token_ratio == 1.0


def test_preference_pairs_are_right_padded_and_scored_by_a_mask() -> None:
    prompt = list(range(3, 25))
    ids = torch.tensor([[*prompt, 30, 31, 0], [*prompt, 40, 41, 42]])
    mask = (ids != 0).long()
    completion = mask.clone()
    completion[:, : len(prompt)] = 0
    packing = pack(ids, mask, score_mask=completion)
    assert packing.packed_tokens == 22 + 1 + 2
    assert torch.equal(packing.unpack(packing.shift_labels), ids * completion)


@pytest.mark.parametrize(
    ("mask", "keep", "message"),
    [
        ([[1, 0, 1, 1]], 2, "Row 0 has padding between real tokens"),
        ([[0, 0, 1, 1]], 2, "Row 0 scores its first real token"),
        ([[1, 1, 1, 1]], 5, "logits_to_keep must be in 1..4, got 5"),
        ([[1, 1, 1, 1]], None, "logits_to_keep must be in 1..4, got None"),
        ([[1, 1, 1]], 1, r"must both be \(B, L\), got \(1, 4\) and \(1, 3\)"),
    ],
)
def test_batches_that_cannot_be_packed(mask: list[list[int]], keep: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack(torch.ones(1, 4, dtype=torch.long), torch.tensor(mask), keep)


def test_scoring_padding_is_an_error() -> None:
    ones = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="Row 0 scores a padding token"):
        pack(ones, torch.tensor([[1, 1, 0, 0]]), score_mask=torch.tensor([[0, 1, 1, 0]]))


def test_unpack_checks_the_number_of_values(groups: Batch) -> None:
    packing = pack(*groups)
    with pytest.raises(ValueError, match=r"predictions, got \(3,\)"):
        packing.unpack(torch.zeros(3))


def test_pairs_count_what_attention_computes(groups: Batch, ancestors: Callable[..., torch.Tensor]) -> None:
    packing = pack(*groups, min_run=2)
    assert packing.layout.pairs == int(ancestors(packing.tree, packing.layout.bounds).sum())


def test_positions_by_column(padded: Any) -> None:
    rng = random.Random(0)
    system = random_tokens(rng, 20)
    prompts = [system + random_tokens(rng, length) for length in (18, 25)]
    ids, mask, width = padded([(prompt, random_tokens(rng, 4)) for prompt in prompts for _ in range(2)])
    by_depth, by_column = pack(ids, mask, width), pack(ids, mask, width, by_column=True)
    # The system prompt is shared by all rows, or only by those with equally much padding.
    assert [len(node.rows) for node in by_depth.tree.nodes] == [4, 2, 1, 1, 2, 1, 1]
    assert [len(node.rows) for node in by_column.tree.nodes] == [2, 1, 1, 2, 1, 1]
    for packing, offsets in ((by_depth, (0, 0)), (by_column, (7, 0))):
        for node, start in zip(packing.tree.nodes, packing.layout.bounds, strict=False):
            offset = offsets[min(node.rows) // 2]
            positions = packing.position_ids[0, start : start + node.end - node.start].tolist()
            assert positions == [offset + depth for depth in range(node.start, node.end)]
            tokens = packing.input_ids[0, start : start + node.end - node.start]
            row = node.rows[0]
            column = offsets[row // 2] if packing is by_column else 7 * (row < 2)
            assert torch.equal(tokens, ids[row, column + node.start : column + node.end])


def test_the_first_column_is_never_scored(padded: Any) -> None:
    """As in TRL, whose labels of a pair with an empty prompt begin there."""
    ids, mask, _ = padded([([], [5, 6, 7, 8]), ([], [5, 6, 9])])
    packing = pack(ids, mask, score_mask=mask)
    assert ((packing.slots < packing.predictors.numel()) == (mask.bool() & (torch.arange(4) > 0))).all()


def test_rows_that_cannot_be_packed_are_refused(padded: Any) -> None:
    ids, mask, width = padded([([], [5, 6]), ([3, 4], [5, 6])])
    with pytest.raises(BatchError, match="Row 0 scores its first real token") as caught:
        pack(ids, mask, width)
    assert isinstance(caught.value, RefusedError)
