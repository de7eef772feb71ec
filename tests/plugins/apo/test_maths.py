"""APO: the forms of its extrapolation, precision, and weights that cannot be extrapolated."""

from __future__ import annotations

import math

import pytest
import torch

from tests.plugins.apo.runs import equal
from trl_ext_plugins.apo.maths import coefficients, extrapolate, momentum


def test_three_forms_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(5, dtype=torch.float64, generator=generator)
    updates = torch.randn(4, 5, dtype=torch.float64, generator=generator)
    alpha = 0.4
    start = previous = buffered = reference
    velocity = torch.zeros_like(reference)
    for index, update in enumerate(updates):
        new = start + update
        closed = reference + (torch.tensor(coefficients(alpha, index + 1)).unsqueeze(1) * updates[: index + 1]).sum(0)
        torch.testing.assert_close(new, closed)
        start, previous = extrapolate({"w": new}, {"w": previous}, alpha)["w"], new
        buffered, velocity = momentum(buffered, buffered + update, velocity, alpha)
        torch.testing.assert_close(start, buffered)
    assert coefficients(0.3, 3) == pytest.approx([1.39, 1.3, 1.0])


def test_extrapolation_keeps_shape_precision_and_what_is_no_number() -> None:
    new = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "steps": torch.tensor([3])}
    old = {"w": torch.zeros(2, 3, dtype=torch.bfloat16), "steps": torch.tensor([1])}
    found = extrapolate(new, old, 0.5)
    assert found["w"].dtype is torch.bfloat16 and found["w"].shape == (2, 3) and found["steps"].item() == 3
    assert equal(extrapolate(new, new, 0.5), new) and equal(extrapolate(new, old, 0.0), new)


def test_small_updates_of_bfloat16_are_rounded_once() -> None:
    old = torch.full((64,), 1.0, dtype=torch.bfloat16)
    new = old.clone()
    new[::2] = 1.0078125  # the next number
    found = extrapolate({"w": new}, {"w": old}, 0.6)["w"]
    exact = (new.double() + 0.6 * (new.double() - old.double())).to(torch.bfloat16)
    assert torch.equal(found, exact) and found[0] > new[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_weights_are_not_extrapolated(value: float) -> None:
    with pytest.raises(ValueError, match="w holds values that are not finite"):
        extrapolate({"w": torch.tensor([value])}, {"w": torch.tensor([1.0])}, 0.3)
    with pytest.raises(ValueError, match="other names"):
        extrapolate({"w": torch.ones(1)}, {"v": torch.ones(1)}, 0.3)
    with pytest.raises(ValueError, match="has shape"):
        extrapolate({"w": torch.ones(1)}, {"w": torch.ones(2)}, 0.3)
