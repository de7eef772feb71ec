"""The arithmetic of a model and a batch, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trl_ext.shared_prefix import ModelCost, ModelParts, flop_ratio, pack


def test_the_matrices_of_a_model(tiny: Any) -> None:
    cost = ModelCost.of(tiny())
    # Two layers, each with query and output, key and value, and three matrices of the feed-forward part.
    assert cost.token == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    assert cost.prediction == 61 * 32
    assert cost.pair == 2 * 32 * 2
    assert ModelCost.of(ModelParts.of(tiny())) == cost


def test_the_ratio_of_a_batch(tiny: Any, groups: Any) -> None:
    packing = pack(*groups)
    assert flop_ratio(packing, ModelCost(1, 0, 0)) == pytest.approx(packing.token_ratio)
    assert flop_ratio(packing, ModelCost(0, 0, 1)) == packing.dense_pairs / packing.layout.pairs
    assert flop_ratio(packing, ModelCost.of(tiny())) > 1


def test_experts_count_as_often_as_they_are_visited(tiny: Any) -> None:
    dense, sparse = (ModelCost.of(tiny("Mixtral", num_local_experts=n, num_experts_per_tok=1)) for n in (1, 4))
    router = 2 * 32 * (4 - 1)
    assert sparse.token == dense.token + router


def test_empty_shards_count_with_their_whole_shape(tiny: Any) -> None:
    """DeepSpeed stage 3 leaves parameters of shape [0] behind and notes their shape beside them."""
    model = tiny()
    cost = ModelCost.of(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert ModelCost.of(model) == cost
