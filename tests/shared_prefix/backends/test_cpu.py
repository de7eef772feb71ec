"""The CPU kernels: keys are shared by query heads without a copy, in as few calls as possible."""

from __future__ import annotations

import pytest
import torch

from trl_ext.shared_prefix import build_tree, cascade_attention, choose_backend
from trl_ext.shared_prefix.backends import cpu
from trl_ext.shared_prefix.layout import layout_of


def test_keys_are_never_repeated_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that every key tensor handed to the operator is a view of the packed keys."""
    layout = layout_of(build_tree([[1] * 20 + [number] * 3 for number in range(2, 8)]))
    q, k = torch.randn(layout.length, 8, 16), torch.randn(layout.length, 2, 16)
    pointers = []
    original = cpu._forward

    def recorded(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pointers.append(k.untyped_storage().data_ptr())
        return original(q, k, v, causal, scale)

    monkeypatch.setattr(cpu, "_forward", recorded)
    cascade_attention(q, k, k, layout, choose_backend(torch.device("cpu"), torch.float32, name="aten"))
    assert set(pointers) == {k.untyped_storage().data_ptr()}
    assert len(pointers) == 4  # the prompt, its descendants, and the six equal leaves once per key head
