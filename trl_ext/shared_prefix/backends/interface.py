"""Interface of the attention kernels, and the merge of their results that all of them use.

Tensors are token-major, as in a packed row: `q` is (N, H, D), `k` and `v` are (N, Hkv, D), where `H` is a multiple of
`Hkv` and query head `h` reads key head `h // (H / Hkv)`. `lse` is (N, H), in float32 or, for float64 input, float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from ..layout import CascadeLayout


class Backend(ABC):
    """Kernels for cascade attention over a packed row."""

    name: str

    @abstractmethod
    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Returns why this backend cannot serve such a model, or None if it can."""

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
        """Attends from each token to itself and to the tokens before it in its rows.

        Returns:
            `out` (N, H, D) and `lse` (N, H), both merged over all calls.
        """

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
        """Returns the gradients `dq`, `dk` and `dv`, given the `out` and `lse` that `forward` returned."""


def merge(
    out: torch.Tensor,
    lse: torch.Tensor,
    more_out: torch.Tensor,
    more_lse: torch.Tensor,
    rows: slice | torch.Tensor,
) -> None:
    """Merges attention over further keys into some rows of `out` and `lse`, in place.

    With `w = sigmoid(more_lse - lse)`, the softmax over both sets of keys is `(1 - w) out + w more_out`. The
    log-sum-exp of all scores is `logaddexp(lse, more_lse)`.

    Args:
        out: (N, H, D) the result so far.
        lse: (N, H) its log-sum-exp.
        more_out: (n, H, D) attention of the same queries over the further keys alone.
        more_lse: (n, H) its log-sum-exp.
        rows: The `n` packed tokens that are these queries.
    """
    old_lse = lse[rows]
    weight = torch.sigmoid(more_lse - old_lse).to(out.dtype).unsqueeze(-1)
    if isinstance(rows, slice):
        # `out[rows]` and `old_lse` are views here, so both can be written in place.
        out[rows].lerp_(more_out, weight)
        torch.logaddexp(old_lse, more_lse, out=old_lse)
    else:
        out[rows] = torch.lerp(out[rows], more_out, weight)
        lse[rows] = torch.logaddexp(old_lse, more_lse)
