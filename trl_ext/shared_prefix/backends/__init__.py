"""The attention kernels behind one signature, and the one function that chooses between them.

Tensors are token-major, as in a packed row: `q` (N, H, D), `k` and `v` (N, Hkv, D) with `H` a multiple of `Hkv` and
query head `h` reading key head `h // (H / Hkv)`. `lse` is (N, H), float32 (float64 for float64 input).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module

import torch

from ..errors import RefusedError
from ..layout import CascadeLayout

# Modules are loaded when chosen. The order is that of the automatic choice.
_MODULES = {"flash_attn": "flash", "aten": "cpu", "math": "reference"}
_made: dict[str, Backend] = {}


class Backend(ABC):
    """Cascade attention over a packed row."""

    name: str

    @abstractmethod
    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """The reason why this backend cannot serve such a model, or None."""

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: CascadeLayout,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token attends to itself and to what stands before it in its rows. Returns `out` (N, H, D) and `lse`."""

    @abstractmethod
    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        layout: CascadeLayout,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients `dq`, `dk`, `dv`, given what `forward` returned."""


def get_backend(name: str) -> Backend:
    """The backend of this name."""
    if name not in _MODULES:
        raise RefusedError(f"There is no shared-prefix backend {name!r}. Known: {', '.join(_MODULES)}.")
    if name not in _made:
        _made[name] = import_module(f"{__name__}.{_MODULES[name]}").BACKEND
    return _made[name]


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
        dtype: The type that attention computes in (under autocast, autocast's type).
        head_dim: Width of a head, if known.
        softcap: Whether the model caps its attention scores.
        name: Take this one: "flash_attn", "aten" or "math".

    Raises:
        RefusedError: The one asked for, or every one, cannot serve; the text has each one's reason.
    """
    if name is not None:
        backend = get_backend(name)
        reason = backend.why_not(device, dtype, head_dim, softcap)
        if reason is not None:
            raise RefusedError(f"The shared-prefix backend {name!r} cannot run here: {reason}")
        return backend
    reasons = []
    for candidate in _MODULES:
        backend = get_backend(candidate)
        if candidate == "math" and device.type != "cpu":
            reasons.append("math: would be slow; choose it by name if you want it, backend='math'")
            continue
        reason = backend.why_not(device, dtype, head_dim, softcap)
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}")
    raise RefusedError("No shared-prefix backend can run here. " + "; ".join(reasons))


def merge(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor, rows: slice | torch.Tensor
) -> None:
    """Merges attention over further keys, `part` and `part_lse`, into these rows of `out` and `lse`, in place.

    With `w = sigmoid(part_lse - lse)` the softmax over both sets of keys is `(1 - w) out + w part`, and its
    normaliser is `logaddexp(lse, part_lse)`.
    """
    old = lse[rows]
    weight = torch.sigmoid(part_lse - old).to(out.dtype).unsqueeze(-1)
    if isinstance(rows, slice):
        out[rows].lerp_(part, weight)
        torch.logaddexp(old, part_lse, out=old)
    else:
        out[rows] = torch.lerp(out[rows], part, weight)
        lse[rows] = torch.logaddexp(old, part_lse)
