"""DisCO: a variant of the cases of DRPO."""

from __future__ import annotations

from tests.golden.adapters.drpo import compare

__all__ = ["compare"]
