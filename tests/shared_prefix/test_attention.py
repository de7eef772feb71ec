"""Cascade attention compared with masked dense attention: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_ext.shared_prefix import CascadeLayout, RefusedError, build_tree, cascade_attention, choose_backend
from trl_ext.shared_prefix.layout import layout_of

CPU = torch.device("cpu")
property_test = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    repeats = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q, k.repeat_interleave(repeats, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", p, v.repeat_interleave(repeats, 1))


def largest_differences(
    layout: CascadeLayout,
    mask: torch.Tensor,
    backend: str,
    dtype: torch.dtype,
    heads: tuple[int, int] = (4, 2),
    softcap: float | None = None,
    reference: torch.dtype = torch.float64,
    width: int = 8,
) -> list[float]:
    """Returns the largest differences of the output and of dq, dk and dv, the latter relative to the largest value."""
    generator = torch.Generator().manual_seed(layout.length)
    shapes = [(layout.length, heads[0], width), (layout.length, heads[1], width), (layout.length, heads[1], width)]
    inputs = [torch.randn(s, generator=generator, dtype=reference).to(dtype).requires_grad_() for s in shapes]
    wide = [x.detach().to(reference).requires_grad_() for x in inputs]
    kernels = choose_backend(CPU, dtype, name=backend)
    cascade = cascade_attention(*inputs, layout, kernels, 0.4, softcap)
    expected = dense(*wide, mask, 0.4, softcap)
    weights = torch.randn(expected.shape, generator=generator, dtype=reference)
    grads = torch.autograd.grad(cascade, inputs, weights.to(dtype))
    expected_grads = torch.autograd.grad(expected, wide, weights)
    output_difference = float((cascade.to(reference) - expected).detach().abs().max())
    gradient_differences = [
        float((grad.to(reference) - expected_grad).abs().max() / expected_grad.abs().max().clamp(min=1))
        for grad, expected_grad in zip(grads, expected_grads, strict=True)
    ]
    return [output_difference, *gradient_differences]


@property_test
@given(seed=st.integers(0, 10**6), min_run=st.integers(1, 4), softcap=st.sampled_from([None, 2.0]))
def test_random_trees_in_float64(
    seed: int,
    min_run: int,
    softcap: float | None,
    trees: Callable[..., list[list[int]]],
    ancestors: Callable[..., torch.Tensor],
) -> None:
    tree = build_tree(trees(seed), min_run)
    layout = layout_of(tree)
    mask = ancestors(tree, layout.bounds)
    assert max(largest_differences(layout, mask, "math", torch.float64, softcap=softcap)) < 1e-12


@property_test
@given(seed=st.integers(0, 10**6), min_run=st.integers(1, 4), heads=st.sampled_from([(4, 2), (3, 3), (6, 1)]))
def test_random_trees_in_float32(
    seed: int,
    min_run: int,
    heads: tuple[int, int],
    trees: Callable[..., list[list[int]]],
    ancestors: Callable[..., torch.Tensor],
) -> None:
    tree = build_tree(trees(seed), min_run)
    layout = layout_of(tree)
    mask = ancestors(tree, layout.bounds)
    assert max(largest_differences(layout, mask, "aten", torch.float32, heads)) < 1e-5


@pytest.mark.parametrize("backend", ["aten", "math"])
def test_bfloat16(backend: str, trees: Callable[..., list[list[int]]], ancestors: Callable[..., torch.Tensor]) -> None:
    for seed in range(5):
        tree = build_tree(trees(seed), 2)
        layout = layout_of(tree)
        assert max(largest_differences(layout, ancestors(tree, layout.bounds), backend, torch.bfloat16)) < 3e-2


@pytest.mark.parametrize("backend", ["aten", "math"])
def test_runs_longer_than_the_kernels_blocks(backend: str, ancestors: Callable[..., torch.Tensor]) -> None:
    stem = [i % 7 for i in range(600)]
    rows = [[*stem, 10 + i, *[i] * 40] for i in range(5)] + [stem[:530] + [99] * 70]
    tree = build_tree(rows)
    layout = layout_of(tree)
    dtype = torch.float32
    assert tree.depth == 3
    assert max(largest_differences(layout, ancestors(tree, layout.bounds), backend, dtype, width=16)) < 1e-5


def test_one_row_is_plain_causal_attention(ancestors: Callable[..., torch.Tensor]) -> None:
    tree = build_tree([[1, 2, 3, 4, 5]])
    layout = layout_of(tree)
    assert max(largest_differences(layout, torch.ones(5, 5).tril().bool(), "math", torch.float64)) < 1e-12
    assert layout.crosses == ()


@pytest.mark.parametrize("backend", ["aten", "math"])
def test_values_narrower_than_keys(backend: str) -> None:
    layout = layout_of(build_tree([[1] * 20 + [2, 3], [1] * 20 + [4]]))
    q, k = torch.randn(layout.length, 4, 16), torch.randn(layout.length, 4, 16)
    v = torch.randn(layout.length, 4, 8, requires_grad=True)
    kernels = choose_backend(CPU, torch.float32, name=backend)
    narrow = cascade_attention(q, k, v, layout, kernels)
    padded = cascade_attention(q, k, torch.nn.functional.pad(v, (0, 8)), layout, kernels)
    assert narrow.shape == (layout.length, 4, 8)
    assert torch.equal(narrow, padded[..., :8])
    narrow.sum().backward()


@pytest.mark.parametrize("backend", ["aten", "math"])
def test_values_wider_than_keys(backend: str) -> None:
    layout = layout_of(build_tree([[1] * 20 + [2, 3], [1] * 20 + [4]]))
    q, k = torch.randn(layout.length, 4, 8, requires_grad=True), torch.randn(layout.length, 4, 8)
    v = torch.randn(layout.length, 4, 16)
    kernels = choose_backend(CPU, torch.float32, name=backend)
    wide = cascade_attention(q, k, v, layout, kernels)
    halves = [cascade_attention(q, k, half, layout, kernels) for half in v.split(8, dim=-1)]
    torch.testing.assert_close(wide, torch.cat(halves, -1), atol=1e-6, rtol=0)
    weights = torch.randn_like(wide)
    (grad,) = torch.autograd.grad((wide * weights).sum(), q)
    (expected,) = torch.autograd.grad((torch.cat(halves, -1) * weights).sum(), q)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)


AUTOCAST = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize("backend", [None, "aten", "math"])
def test_every_backend_under_every_autocast(
    backend: str | None, autocast: torch.dtype, dtype: torch.dtype, softcap: float | None
) -> None:
    """Tensors of any type, and of several at once, as rotary embeddings leave them."""
    layout = layout_of(build_tree([[1] * 20 + [2, 3], [1] * 20 + [4]]))
    computed = torch.float64 if dtype == torch.float64 else autocast
    if backend == "aten" and (softcap is not None or computed != torch.bfloat16):
        with pytest.raises(RefusedError, match="'aten' cannot run here"):
            choose_backend(CPU, computed, name=backend, softcap=softcap is not None)
        return
    kernels = choose_backend(CPU, computed, name=backend, softcap=softcap is not None)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.length, h, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    inputs = [q.float().requires_grad_(), k.to(dtype).requires_grad_(), v.to(dtype).requires_grad_()]
    with torch.autocast("cpu", dtype=autocast):
        out = cascade_attention(*inputs, layout, kernels, softcap=softcap)
        assert out.dtype == computed
        inside = torch.autograd.grad(out.double().sum(), inputs, retain_graph=True)
    outside = torch.autograd.grad(out.double().sum(), inputs)
    exact = [x.detach().to(computed).double().requires_grad_() for x in inputs]
    expected = cascade_attention(*exact, layout, choose_backend(CPU, torch.float64), softcap=softcap)
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    gradients = torch.autograd.grad(expected.sum(), exact)
    for grad, again, expected_grad, x in zip(inside, outside, gradients, inputs, strict=True):
        assert grad.dtype == x.dtype
        assert torch.equal(grad, again)
        torch.testing.assert_close(grad.double(), expected_grad, atol=0.1, rtol=0.05)


def test_without_gradients_nothing_is_kept() -> None:
    layout = layout_of(build_tree([[1] * 20 + [2, 3], [1] * 20 + [4]]))
    q, k = torch.randn(layout.length, 4, 16, requires_grad=True), torch.randn(layout.length, 2, 16)
    with torch.no_grad():
        out = cascade_attention(q, k, k, layout, choose_backend(CPU, torch.float32))
    assert out.grad_fn is None


def test_autocast_sets_the_type() -> None:
    layout = layout_of(build_tree([[1] * 20 + [2, 3], [1] * 20 + [4]]))
    q, k = torch.randn(layout.length, 4, 16, requires_grad=True), torch.randn(layout.length, 2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cascade_attention(q, k, k.bfloat16(), layout, choose_backend(CPU, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_shapes_are_checked() -> None:
    layout = layout_of(build_tree([[1] * 20 + [2, 3], [1] * 20 + [4]]))
    kernels = choose_backend(CPU, torch.float32)
    with pytest.raises(ValueError, match=r"with N = 23, got \(22, 4, 8\)"):
        cascade_attention(torch.ones(22, 4, 8), torch.ones(23, 2, 8), torch.ones(23, 2, 8), layout, kernels)
