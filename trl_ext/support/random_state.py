"""The random generators that training uses."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores the generators of Python, NumPy and torch after the block."""
    import numpy
    import torch

    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)
