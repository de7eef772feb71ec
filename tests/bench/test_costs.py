"""Memory of a call."""

import torch

from trl_ext.bench.costs import peak_bytes


def test_peak_memory_counts_what_is_held_at_once():
    def hold():
        kept = torch.ones(1 << 20)
        del kept
        return torch.ones(1 << 19)

    peak = peak_bytes(hold)
    assert (1 << 22) <= peak < (1 << 22) + (1 << 21)
