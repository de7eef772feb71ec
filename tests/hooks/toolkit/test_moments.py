"""Running moments: those of everything seen, however it came."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext_hooks.toolkit.moments import add_to_moments, running_std


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_everything_seen(batches: list[list[float]]) -> None:
    moments = (0.0, 0.0, 0.0)
    for batch in batches:
        moments = add_to_moments(moments, torch.tensor(batch))
    everything = torch.tensor([value for batch in batches for value in batch], dtype=torch.float64)
    expected = max(everything.std().item(), 1e-4) if len(everything) > 1 else 1.0
    assert running_std(moments) == pytest.approx(expected, abs=1e-5)
    assert moments[0] == len(everything)
