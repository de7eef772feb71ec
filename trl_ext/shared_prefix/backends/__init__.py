"""Backends: the attention kernels, and the function that chooses among them.

`interface` says what a backend is. `flash` runs on CUDA, `cpu` on a CPU, and `reference` anywhere, but slowly.
"""

from __future__ import annotations

import torch

from ..errors import RefusedError
from .cpu import AtenBackend
from .flash import FlashAttnBackend
from .interface import Backend, merge
from .reference import MathBackend

__all__ = ["BACKENDS", "Backend", "choose_backend", "get_backend", "merge"]

# By name, in the order of preference of the automatic choice.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (FlashAttnBackend(), AtenBackend(), MathBackend())}


def get_backend(name: str) -> Backend:
    """Returns the backend of this name."""
    if name not in BACKENDS:
        raise RefusedError(f"There is no shared-prefix backend {name!r}. Known: {', '.join(BACKENDS)}.")
    return BACKENDS[name]


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_dim: int | None = None,
    softcap: bool = False,
    name: str | None = None,
) -> Backend:
    """Chooses the backend for a model, or checks the one that was asked for.

    Args:
        device: Where the model runs.
        dtype: The dtype that attention computes in. Under autocast this is autocast's dtype.
        head_dim: Width of an attention head, if known.
        softcap: Whether the model caps its attention scores.
        name: The backend to take: "flash_attn", "aten" or "math". None chooses the best one that can serve.

    Raises:
        RefusedError: The backend asked for cannot serve, or none can. The message gives the reason of each.
    """
    if name is not None:
        backend = get_backend(name)
        reason = backend.why_not(device, dtype, head_dim, softcap)
        if reason is not None:
            raise RefusedError(f"The shared-prefix backend {name!r} cannot run here: {reason}")
        return backend
    reasons = []
    for candidate, backend in BACKENDS.items():
        if candidate == "math" and device.type != "cpu":
            reasons.append("math: would be slow. Choose it by name if you want it, backend='math'.")
            continue
        reason = backend.why_not(device, dtype, head_dim, softcap)
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise RefusedError("No shared-prefix backend can run here. " + " ".join(reasons))
