"""`flash_attn`: the variable-length kernels of the flash-attn package, on CUDA in float16 or bfloat16.

The two functions used here are private. Their arguments and return values differ between 2.6, 2.7 and 2.8. So their
signatures are checked once, and they are called by keyword with the arguments that they have.
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
from .interface import Backend, merge

MODULE = "flash_attn.flash_attn_interface"

# Arguments that the functions must have in every version.
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
_FORWARD = ("q", "k", "v", *_LENGTHS, "dropout_p", "softmax_scale", "causal")
_BACKWARD = ("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", *_FORWARD[3:], "deterministic")
# Arguments that some versions have and that we know how to fill.
_OPTIONAL = ("window_size", "window_size_left", "window_size_right", "softcap", "alibi_slopes")


class FlashAttnBackend(Backend):
    """Flash attention on CUDA: one causal call for all nodes, then one call for each level of the tree."""

    name = "flash_attn"

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Requires CUDA, a half type, a head width that the kernels have, and a known version of the package."""
        if device.type != "cuda":
            return f"its kernels are for CUDA, but the model is on {device}."
        return self.why_not_beside_device(dtype, head_dim, softcap)

    def why_not_beside_device(self, dtype: torch.dtype, head_dim: int | None, softcap: bool) -> str | None:
        """Checks all of `why_not` except the device."""
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 or bfloat16, not {dtype}: load the model in bfloat16 or set bf16=True."
        if head_dim is not None and (head_dim % 8 or head_dim > 256):
            return f"its head widths are multiples of 8 up to 256, but the model's is {head_dim}."
        try:
            kernels = self._kernels
        except ImportError as error:
            return f"the package cannot be imported ({error}): pip install flash-attn --no-build-isolation."
        except RefusedError as error:
            return str(error)
        if softcap and "softcap" not in kernels.arguments:
            return "this version has no soft-capping: install flash-attn 2.6 or later."
        return None

    @cached_property
    def _kernels(self) -> Kernels:
        """Imports the package, which is optional, when this backend is first considered."""
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
        """Runs the causal call, then merges the attention to the nodes above. See `Backend.forward`."""
        causal_call, *level_calls = layout.varlen_calls(q.device)
        out, lse = self._kernels.forward(q, k, v, causal_call, scale, softcap)
        lse = lse.t().contiguous()
        for call in level_calls:
            rows, keys = call.rows_q, call.rows_k
            call_out, call_lse = self._kernels.forward(q[rows], k[keys], v[keys], call, scale, softcap)
            merge(out, lse, call_out, call_lse.t(), rows)
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
        """Hands every call the merged `out` and `lse`, so that it returns its exact share of the gradients."""
        causal_call, *level_calls = layout.varlen_calls(q.device)
        lse = lse.t().contiguous()  # (H, N), as the kernels take it
        dq, dk, dv = self._kernels.backward(dout, q, k, v, out, lse, causal_call, scale, softcap)
        for call in level_calls:
            rows, keys = call.rows_q, call.rows_k
            call_dq, call_dk, call_dv = self._kernels.backward(
                dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows].contiguous(), call, scale, softcap
            )
            dq[rows] += call_dq
            dk[keys] += call_dk
            dv[keys] += call_dv
        return dq, dk, dv


class Kernels:
    """The two functions of one version of the package.

    Attributes:
        version: Version of the package, for messages.
        arguments: Names of the arguments that both functions have.
    """

    def __init__(self, module: Any) -> None:
        self.version: str = getattr(import_module("flash_attn"), "__version__", "unknown")
        self._forward, forward_arguments = self._checked(module, "_flash_attn_varlen_forward", _FORWARD)
        self._backward, backward_arguments = self._checked(module, "_flash_attn_varlen_backward", _BACKWARD)
        self.arguments = forward_arguments & backward_arguments
        # Whether the log-sum-exp comes as (tokens, heads), as from the Triton kernels for ROCm. None until it is known.
        self._token_major: bool | None = None
        # A window of -1 on both sides is no window. 2.6 takes it as a pair, later versions as two numbers.
        if "window_size_left" in self.arguments:
            self._no_window: dict[str, Any] = {"window_size_left": -1, "window_size_right": -1}
        elif "window_size" in self.arguments:
            self._no_window = {"window_size": (-1, -1)}
        else:
            raise RefusedError(
                f"flash-attn {self.version} takes its window in an unknown way. Install flash-attn 2.6.3 to 2.8."
            )

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
        out, lse = self._call_forward(q, k, v, call, scale, softcap)
        tokens, heads = q.shape[:2]
        if tokens == heads and self._token_major is None:
            # The shape does not tell which of the two comes first, so a call of another shape is made.
            self._learn_order(q, k, v, scale, softcap)
        elif tokens != heads:
            self._token_major = lse.shape == (tokens, heads)
        lse = lse.t() if self._token_major else lse
        if lse.shape != (heads, tokens):
            raise RefusedError(
                f"flash-attn {self.version} returned its log-sum-exp as {tuple(lse.shape)}, expected (heads, tokens) "
                f"= {(heads, tokens)} or the reverse. Install flash-attn 2.6.3 to 2.8."
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
        """Returns `dq`, `dk` and `dv`. `lse` is taken as (H, n)."""
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # The kernels write the gradients into the tensors given.
        self._backward(
            dout=dout.contiguous(),
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse.t().contiguous() if self._token_major else lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **self._call_arguments(call, scale, softcap),
        )
        return dq, dk, dv

    def _call_forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: VarlenCall,
        scale: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `out` and the log-sum-exp as the kernels order it."""
        result = self._forward(q=q, k=k, v=v, **self._call_arguments(call, scale, softcap))
        # 2.6 returns (out, q, k, v, padded out, lse, mask, rng), later versions return (out, lse, mask, rng).
        return (result[0], result[5]) if len(result) == 8 else (result[0], result[1])

    def _learn_order(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float | None
    ) -> None:
        """Calls the kernels on one token more than there are heads, to see in which order they return both."""
        tokens = q.shape[1] + 1
        q, k, v = (x.new_zeros(tokens, *x.shape[1:]) for x in (q, k, v))
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        call = VarlenCall(True, slice(0, tokens), slice(0, tokens), bounds, bounds, tokens, tokens)
        _, lse = self._call_forward(q, k, v, call, scale, softcap)
        self._token_major = lse.shape == (tokens, q.shape[1])

    def _call_arguments(self, call: VarlenCall, scale: float, softcap: float | None) -> dict[str, Any]:
        """Returns the arguments that both functions take besides the tensors."""
        arguments: dict[str, Any] = {
            "cu_seqlens_q": call.cu_q,
            "cu_seqlens_k": call.cu_k,
            # The kernels accept an upper bound. With 1 they would rearrange the heads, and the log-sum-exp with them.
            "max_seqlen_q": max(call.max_q, 2),
            "max_seqlen_k": call.max_k,
            "dropout_p": 0.0,
            "softmax_scale": scale,
            "causal": call.causal,
            **self._no_window,
        }
        if "softcap" in self.arguments:
            arguments["softcap"] = softcap or 0.0
        if "alibi_slopes" in self.arguments:
            arguments["alibi_slopes"] = None
        return arguments

    def _checked(self, module: Any, name: str, needed: tuple[str, ...]) -> tuple[Callable[..., Any], set[str]]:
        """Returns a function of the package and the names of its arguments, or refuses an unknown signature."""
        function = getattr(module, name, None)
        if function is None:
            raise RefusedError(f"flash-attn {self.version} has no {name}. Install flash-attn 2.6.3 to 2.8.")
        parameters = _signature(function)
        missing = [parameter for parameter in needed if parameter not in parameters]
        known = {*needed, *_OPTIONAL}
        unknown = [p.name for p in parameters.values() if p.default is p.empty and p.name not in known]
        if missing or unknown:
            raise RefusedError(
                f"{name} of flash-attn {self.version} has another signature than in 2.6.3 to 2.8: "
                f"missing {missing}, unknown and required {unknown}."
            )
        return function, set(parameters)


def _signature(function: Any) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function. From 2.7 on, `torch.library.custom_op` hides it in `_init_fn`."""
    return dict(inspect.signature(getattr(function, "_init_fn", function)).parameters)
