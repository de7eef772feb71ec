"""The random generators that training uses."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator


@contextlib.contextmanager
def untouched_random_state() -> Iterator[None]:
    """Restores the generators of Python, NumPy and torch after the block."""
    import numpy

    python, legacy = random.getstate(), numpy.random.get_state()
    try:
        with untouched_torch_state():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy)


@contextlib.contextmanager
def untouched_torch_state() -> Iterator[None]:
    """Restores torch's generators of the CPU and of every accelerator after the block."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    kind = "cuda" if accelerator is None else accelerator.type
    if kind == "mps":  # it has one generator, which torch reads without the number of a device
        state = torch.mps.get_rng_state()
        try:
            with torch.random.fork_rng(devices=[]):
                yield
        finally:
            torch.mps.set_rng_state(state)
        return
    # named one by one, because torch warns where several devices are left to it
    devices = range(torch.get_device_module(kind).device_count())
    with torch.random.fork_rng(devices=devices, device_type=kind):
        yield
