"""The last feed-forward part sees predictors only, and the rows left out come back as zeros."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from trl_ext.shared_prefix import (
    pack,
    packed_scores,
)
from trl_ext.shared_prefix.last_layer import only_rows


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_feed_forward_sees_only_tokens_that_predict(checkpointing: bool, tiny: Any, groups: Any) -> None:
    model = tiny()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    packing = pack(*groups)
    seen: list[list[int]] = []
    for layer in model.model.layers:
        sizes: list[int] = []
        seen.append(sizes)
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].shape[1]))
    scores, _ = packed_scores(model, packing)
    scores["log_probs"].sum().backward()
    times = 2 if checkpointing else 1
    predicting = len(set(packing.predictors.tolist()))
    assert predicting == packing.packed_tokens - 20 - 16  # of each prompt only the last token predicts
    assert seen == [[packing.packed_tokens] * times, [predicting] * times]
    assert not model.model.layers[1].mlp._forward_hooks
    assert not model.model.layers[1].mlp._forward_pre_hooks


@pytest.mark.parametrize("pair", [False, True])
def test_rows_left_out_come_back_as_zeros(pair: bool) -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return (2 * x, "kept") if pair else 2 * x

    module, x = Doubles(), torch.arange(4.0).view(1, 4, 1) + 1
    with only_rows(module, torch.tensor([1, 3]), 4):
        output, other = module(x), module(torch.ones(2, 4, 1))
    assert (output[0] if pair else output).flatten().tolist() == [0.0, 4.0, 0.0, 8.0]
    assert (other[0] if pair else other).sum() == 16  # a call of another shape is left alone
    assert not pair or output[1] == "kept"
