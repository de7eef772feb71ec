"""Log-probabilities and entropies against the textbook formulas, with their gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from trl_ext.shared_prefix import log_probs
from trl_ext.shared_prefix.log_probs import token_log_probs


def textbook(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("block", [1, 30, 1 << 20])
def test_values_and_gradients(temperature: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses blocks of one row, of some rows, and of all rows."""
    monkeypatch.setattr(log_probs, "_BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 11, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(11, (7,), generator=generator)
    weights = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    results = token_log_probs(logits, labels, temperature, entropy=True)
    expected = textbook(logits, labels, temperature)
    for value, expected_value in zip(results, expected, strict=True):
        assert value is not None
        assert torch.allclose(value, expected_value, atol=1e-12)
    # The gradient of either result alone, and of both together.
    for take_logps, take_entropies in product((0.0, 1.0), repeat=2):
        factors = weights * torch.tensor([[take_logps], [take_entropies]], dtype=torch.float64)
        used = [number for number in range(2) if factors[number].any()]
        if not used:
            continue
        grads = [
            torch.autograd.grad(
                sum((factors[number] * values[number]).sum() for number in used), logits, retain_graph=True
            )[0]
            for values in (results, expected)
        ]
        assert torch.allclose(*grads, atol=1e-12)


def test_without_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    logps, entropies = token_log_probs(logits, torch.tensor([0, 2, 4]))
    assert entropies is None
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    (expected,) = torch.autograd.grad(textbook(logits, torch.tensor([0, 2, 4]), 1.0)[0].sum(), logits)
    assert torch.allclose(grad, expected, atol=1e-6)


def test_half_types_are_computed_in_float32() -> None:
    logits = torch.randn(3, 5).bfloat16().requires_grad_()
    logps, entropies = token_log_probs(logits, torch.tensor([0, 2, 4]), entropy=True)
    assert entropies is not None
    assert logps.dtype == entropies.dtype == torch.float32
    logps.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
