"""The call path of the CUDA kernels, with a stand-in that has their real signatures."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from trl_ext.shared_prefix import RefusedError, build_tree, cascade_attention, shared_prefix_logps
from trl_ext.shared_prefix.backends import BACKENDS, flash, get_backend
from trl_ext.shared_prefix.layout import layout_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def segments(cu: torch.Tensor) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(cu.tolist())]


def probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool, softcap: float) -> Any:
    s = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    slope = torch.ones_like(s)
    if softcap > 0:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    if causal:
        s = s.masked_fill(~torch.ones(s.shape[1:]).tril(s.shape[2] - s.shape[1]).bool(), -torch.inf)
    return s, slope


def forward(
    q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, scale: float, causal: bool, softcap: float
) -> Any:
    """Computes variable-length attention segment by segment: out (n, H, D) and lse (H, n)."""
    assert max_q >= max(s.stop - s.start for s in segments(cu_q))
    assert max_k >= max(s.stop - s.start for s in segments(cu_k))
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert len(cu_q) == len(cu_k)
    assert int(cu_q[-1]) == len(q)
    assert int(cu_k[-1]) == len(k) == len(v)
    kind = q.dtype
    q, k, v = (x.to(torch.promote_types(kind, torch.float32)) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for a, b in zip(segments(cu_q), segments(cu_k), strict=True):
        s, _ = probabilities(q[a], k[b], scale, causal, softcap)
        lse[:, a] = s.logsumexp(-1)
        out[a] = torch.einsum("hnm,mhd->nhd", s.softmax(-1), v[b].repeat_interleave(q.shape[1] // k.shape[1], 1))
    return out.to(kind), lse


def backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    dq: Any,
    dk: Any,
    dv: Any,
    cu_q: Any,
    cu_k: Any,
    scale: float,
    causal: bool,
    softcap: float,
) -> None:
    """Fills dq, dk and dv from the given out and lse, and from nothing else of the forward."""
    assert lse.shape == (q.shape[1], len(q))
    assert lse.is_contiguous()
    assert dq.shape == q.shape
    assert dk.shape == k.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    dout, q, k, v, out = (x.to(wide) for x in (dout, q, k, v, out))
    repeats = q.shape[1] // k.shape[1]
    for a, b in zip(segments(cu_q), segments(cu_k), strict=True):
        s, slope = probabilities(q[a], k[b], scale, causal, softcap)
        p = (s - lse[:, a].unsqueeze(-1)).exp()
        dp = torch.einsum("nhd,mhd->hnm", dout[a], v[b].repeat_interleave(repeats, 1))
        ds = p * (dp - (dout[a] * out[a]).sum(-1).t().unsqueeze(-1)) * slope * scale
        dq[a] = torch.einsum("hnm,mhd->nhd", ds, k[b].repeat_interleave(repeats, 1)).to(dq.dtype)
        shape = (-1, k.shape[1], repeats, k.shape[2])
        dk[b] = torch.einsum("hnm,nhd->mhd", ds, q[a]).view(shape).sum(2).to(dk.dtype)
        dv[b] = torch.einsum("hnm,nhd->mhd", p, dout[a]).view(shape).sum(2).to(dv.dtype)


def version_2_6() -> dict[str, Any]:
    """Returns plain functions that take the window as a pair and return eight values."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None,
        leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        assert window_size == (-1, -1)
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap
        )
        return out, q, k, v, out, lse, None, torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert window_size == (-1, -1)
        backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, softcap
        )
        return dq, dk, dv, None

    return {f.__name__: f for f in (_flash_attn_varlen_forward, _flash_attn_varlen_backward)}


def version_2_7(name: str = "trl_ext_stand_in_2_7") -> dict[str, Any]:
    """Returns custom operators that take the window as two numbers, return four values and write gradients in place."""

    def _flash_attn_varlen_forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int = -1,
        window_size_right: int = -1,
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        return_softmax: bool = False,
        block_table: torch.Tensor | None = None,
        leftpad_k: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
        zero_tensors: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        assert (window_size_left, window_size_right) == (-1, -1)
        out, lse = forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap
        )
        return out, lse, torch.empty(0), torch.zeros(2)

    def _flash_attn_varlen_backward(
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: torch.Tensor | None,
        deterministic: bool,
        rng_state: torch.Tensor | None = None,
        zero_tensors: bool = False,
    ) -> torch.Tensor:
        assert (window_size_left, window_size_right) == (-1, -1)
        backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, softcap
        )
        return torch.empty(0)

    # Types as objects: the operators' schemas are read from them.
    for function in (_flash_attn_varlen_forward, _flash_attn_varlen_backward):
        function.__annotations__ = {k: eval(v) for k, v in function.__annotations__.items()}
    operator = torch.library.custom_op
    return {
        "_flash_attn_varlen_forward": operator(f"{name}::forward", _flash_attn_varlen_forward, mutates_args=()),
        "_flash_attn_varlen_backward": operator(
            f"{name}::backward", _flash_attn_varlen_backward, mutates_args=("dq", "dk", "dv")
        ),
    }


VERSIONS = {"2.6.3": version_2_6, "2.7.4": version_2_7, "2.8.3": lambda: version_2_7("trl_ext_stand_in_2_8")}
_functions: dict[str, dict[str, Any]] = {}


@pytest.fixture(params=list(VERSIONS))
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[flash.FlashAttnBackend]:
    """Returns the CUDA backend over a stand-in of one version of the package."""
    if request.param not in _functions:  # operators can be defined once in a process
        _functions[request.param] = VERSIONS[request.param]()
    yield install(monkeypatch, request.param, _functions[request.param])


def install(monkeypatch: pytest.MonkeyPatch, version: str, functions: dict[str, Any]) -> flash.FlashAttnBackend:
    package, module = types.ModuleType("flash_attn"), types.ModuleType(flash.MODULE)
    package.__version__ = version  # type: ignore[attr-defined]
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, flash.MODULE, module)
    return flash.FlashAttnBackend()


def test_stand_in_equals_the_reference(stand_in: flash.FlashAttnBackend, trees: Callable[..., list[list[int]]]) -> None:
    assert stand_in.why_not(CUDA, torch.bfloat16, 64, True) is None
    reference = get_backend("math")
    for seed in range(6):
        layout = layout_of(build_tree(trees(seed), 1 + seed % 3))
        for softcap in (None, 1.5):
            results = []
            for kernels in (stand_in, reference):
                generator = torch.Generator().manual_seed(seed)
                shapes = [(layout.length, heads, 8) for heads in (4, 2, 2)]
                inputs = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
                out = cascade_attention(*inputs, layout, kernels, 0.3, softcap)
                weights = torch.randn(out.shape, dtype=torch.float64, generator=generator)
                results.append([out, *torch.autograd.grad(out, inputs, weights)])
            for value, expected in zip(*results, strict=True):
                assert float((value - expected).detach().abs().max()) < 1e-12


def test_stand_in_serves_a_whole_model(
    stand_in: flash.FlashAttnBackend, tiny: Any, groups: Any, compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stand_in, "why_not", lambda device, *rest: stand_in.why_not_beside_device(*rest))
    monkeypatch.setitem(BACKENDS, "flash_attn", stand_in)
    model = tiny().bfloat16()
    logps, _, report = shared_prefix_logps(model, *groups, backend="flash_attn")
    assert report.backend == "flash_attn"
    difference, gradients = compare(model, *groups, logps)
    assert difference < 0.05
    assert gradients < 0.05


def test_a_version_with_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = version_2_6()

    def _flash_attn_varlen_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, seqlens, softmax_scale, causal):
        raise AssertionError

    backend = install(monkeypatch, "3.0", {**functions, "_flash_attn_varlen_forward": _flash_attn_varlen_forward})
    reason = backend.why_not(CUDA, torch.bfloat16, 64, False)
    assert reason is not None
    assert "_flash_attn_varlen_forward of flash-attn 3.0 has another signature" in reason
    assert "missing ['max_seqlen_q', 'max_seqlen_k', 'dropout_p']" in reason
    assert "unknown and required ['seqlens']" in reason


def test_a_version_without_the_functions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = install(monkeypatch, "1.0", {})
    reason = backend.why_not(CUDA, torch.bfloat16, 64, False)
    assert reason == "flash-attn 1.0 has no _flash_attn_varlen_forward. Install flash-attn 2.6.3 to 2.8."


@pytest.mark.parametrize("rows", [[[1] * 20 + [2, 3], [1] * 20 + [4]], [[1, 2, 3, 4]], [[1, 2], [3, 4]]])
def test_a_log_sum_exp_of_tokens_and_heads(rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels for ROCm return it so, and take it so. With as many tokens as heads, no shape tells it."""
    functions = version_2_6()
    original_forward = functions["_flash_attn_varlen_forward"]
    original_backward = functions["_flash_attn_varlen_backward"]

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    ):  # fmt: skip
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        result = list(original_forward(q, k, v, *sizes, dropout_p, softmax_scale, causal))
        result[5] = result[5].t().contiguous()
        return result

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, deterministic, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    ):  # fmt: skip
        assert softmax_lse.shape == q.shape[:2]
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal)
        named = {"deterministic": deterministic, "window_size": window_size, "softcap": 0.0, "alibi_slopes": None}
        return original_backward(dout, q, k, v, out, softmax_lse.t().contiguous(), dq, dk, dv, *sizes, **named)

    functions["_flash_attn_varlen_forward"] = _flash_attn_varlen_forward
    functions["_flash_attn_varlen_backward"] = _flash_attn_varlen_backward
    backend = install(monkeypatch, "2.8.3", functions)
    layout = layout_of(build_tree(rows, 1))
    results = []
    for kernels in (backend, get_backend("math")):
        generator = torch.Generator().manual_seed(0)
        shapes = [(layout.length, heads, 8) for heads in (4, 2, 2)]
        inputs = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
        out = cascade_attention(*inputs, layout, kernels)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)


def test_a_log_sum_exp_of_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = version_2_6()
    original = functions["_flash_attn_varlen_forward"]

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    ):  # fmt: skip
        result = list(
            original(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal)
        )
        result[5] = result[5][None]
        return result

    functions["_flash_attn_varlen_forward"] = _flash_attn_varlen_forward
    backend = install(monkeypatch, "2.6.0", functions)
    layout = layout_of(build_tree([[1, 2, 3]]))
    x = torch.ones(3, 2, 8)
    with pytest.raises(RefusedError, match=r"returned its log-sum-exp as \(1, 2, 3\), expected .* \(2, 3\)"):
        cascade_attention(x, x, x, layout, backend)
