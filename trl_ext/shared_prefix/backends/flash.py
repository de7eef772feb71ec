"""`flash_attn`: the variable-length kernels of the flash-attn package, on CUDA in float16 or bfloat16.

The functions used are private and changed between 2.6, 2.7 and 2.8: which arguments they take and what they return.
So they are called by keyword, with the arguments their signature has, after it has been checked once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from ..errors import RefusedError
from ..layout import CascadeLayout, VarlenCall
from . import Backend, merge

MODULE = "flash_attn.flash_attn_interface"
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FORWARD = ("q", "k", "v", *_LENGTHS, "dropout_p", "softmax_scale", "causal")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_FORWARD[3:], "deterministic")


class FlashAttnBackend(Backend):
    """One causal call for all nodes, and one call for each level of the tree."""

    name = "flash_attn"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Needs CUDA, a half type, a head width that its kernels have, and the package in a version we know."""
        if device.type != "cuda":
            return f"its kernels are for CUDA, the model is on {device}."
        return self.why_not_beside_device(dtype, head_dim, softcap)

    def why_not_beside_device(self, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """All of `why_not` but the device."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 or bfloat16, not {dtype}: load the model in bfloat16 or set bf16=True."
        if head_dim is not None and (head_dim % 8 or head_dim > 256):
            return f"its heads are multiples of 8 up to 256 wide, the model's {head_dim}."
        try:
            kernels = self._kernels
        except ImportError as error:
            return f"the package is not there ({error}): pip install flash-attn --no-build-isolation."
        except RefusedError as error:
            return str(error)
        if softcap and "softcap" not in kernels.options:
            return "this version knows no soft-capping: install flash-attn 2.6 or later."
        return None

    @cached_property
    def _kernels(self) -> Kernels:
        return Kernels(import_module(MODULE))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: CascadeLayout,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Backend.forward`."""
        first, *levels = layout.varlen(q.device)
        out, lse = self._kernels.forward(q, k, v, first, scale, softcap)
        lse = lse.t().contiguous()
        for call in levels:
            part, part_lse = self._kernels.forward(q[call.rows_q], k[call.rows_k], v[call.rows_k], call, scale, softcap)
            merge(out, lse, part, part_lse.t(), call.rows_q)
        return out, lse

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
        """Every call gets the merged `out` and `lse` and so returns its exact share of the gradients."""
        first, *levels = layout.varlen(q.device)
        lse = lse.t().contiguous()  # (H, N), as the kernels want it
        dq, dk, dv = self._kernels.backward(dout, q, k, v, out, lse, first, scale, softcap)
        for call in levels:
            rows, keys = call.rows_q, call.rows_k
            parts = self._kernels.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows].contiguous(), call, scale, softcap
            )
            dq[rows] += parts[0]
            dk[keys] += parts[1]
            dv[keys] += parts[2]
        return dq, dk, dv


class Kernels:
    """The two functions of one version of the package.

    Attributes:
        options: Arguments that only some versions have.
    """

    def __init__(self, module: Any) -> None:
        self.version: str = getattr(import_module("flash_attn"), "__version__", "unknown")
        self._forward, takes = self._checked(module, "_flash_attn_varlen_forward", _FORWARD)
        self._backward, needs = self._checked(module, "_flash_attn_varlen_backward", _BACKWARD)
        both = takes & needs
        if "window_size_left" in both:
            self._window: dict[str, Any] = {"window_size_left": -1, "window_size_right": -1}
        elif "window_size" in both:
            self._window = {"window_size": (-1, -1)}
        else:
            raise RefusedError(f"flash-attn {self.version} takes its window in a way we do not know.")
        self.options = both

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: VarlenCall,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `out` (n, H, D) and `lse` (H, n)."""
        result = self._forward(q=q, k=k, v=v, **self._arguments(call, scale, softcap))
        # 2.6 returns (out, q, k, v, padded out, lse, mask, rng), later ones (out, lse, mask, rng).
        out, lse = (result[0], result[5]) if len(result) == 8 else (result[0], result[1])
        if lse.shape != (q.shape[1], q.shape[0]):
            raise RefusedError(
                f"flash-attn {self.version} returned its log-sum-exp as {tuple(lse.shape)}, expected (heads, tokens) "
                f"= {(q.shape[1], q.shape[0])}. Install flash-attn 2.6.3 to 2.8."
            )
        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        call: VarlenCall,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns `dq`, `dk`, `dv`; `lse` comes as (H, n)."""
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._backward(
            dout=dout.contiguous(),
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=grads[0],
            dk=grads[1],
            dv=grads[2],
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **self._arguments(call, scale, softcap),
        )
        return grads

    def _arguments(self, call: VarlenCall, scale: float, softcap: float | None) -> dict[str, Any]:
        given: dict[str, Any] = {
            "cu_seqlens_q": call.cu_q,
            "cu_seqlens_k": call.cu_k,
            # An upper bound serves; with 1 the kernels would rearrange the heads, and with them the lse.
            "max_seqlen_q": max(call.max_q, 2),
            "max_seqlen_k": call.max_k,
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": call.causal,
            **self._window,
        }
        if "softcap" in self.options:
            given["softcap"] = softcap or 0.0
        if "alibi_slopes" in self.options:
            given["alibi_slopes"] = None
        return given

    def _checked(self, module: Any, name: str, needed: tuple[str, ...]) -> tuple[Callable[..., Any], set[str]]:
        function = getattr(module, name, None)
        if function is None:
            raise RefusedError(f"flash-attn {self.version} has no {name}. Install flash-attn 2.6.3 to 2.8.")
        parameters = _signature(function)
        missing = [parameter for parameter in needed if parameter not in parameters]
        known = {*needed, "window_size", "window_size_left", "window_size_right", "softcap", "alibi_slopes"}
        unknown = [p.name for p in parameters.values() if p.default is p.empty and p.name not in known]
        if missing or unknown:
            raise RefusedError(
                f"{name} of flash-attn {self.version} has another signature than those of 2.6.3 to 2.8: "
                f"missing {missing}, unknown and required {unknown}."
            )
        return function, set(parameters)


def _signature(function: Any) -> dict[str, inspect.Parameter]:
    # torch.library.custom_op wraps the function that has the signature.
    return dict(inspect.signature(getattr(function, "_init_fn", function)).parameters)


BACKEND = FlashAttnBackend()
