"""Cases of any size for golden adapters: random numbers, single numbers with gradients, and wrong numbers."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Case = dict[str, Any]


def adapter(method: str) -> Callable[[Case], None]:
    """Loads the adapter of a method, as the golden tests do."""
    file = Path(__file__).parent / "adapters" / f"{method}.py"
    spec = importlib.util.spec_from_file_location(f"sizes_{method}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    compare: Callable[[Case], None] = module.compare
    return compare


def check_notices(method: str, case: Case, output: str) -> None:
    """Checks that the adapter refuses the case once the last number of an output is a little off."""
    wrong = copy.deepcopy(case)
    wrong["outputs"][output] = nudged(wrong["outputs"][output])
    with pytest.raises(AssertionError):
        adapter(method)(wrong)


def nudged(value: Any) -> Any:
    return [*value[:-1], nudged(value[-1])] if isinstance(value, list) else value + 1e-6 * max(abs(value), 1.0)


class Draw:
    """Random numbers as lists, and as single tensors with a gradient."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Any:
        return (scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)).tolist()

    def mask(self, rows: int, width: int) -> list[list[int]]:
        lengths = torch.randint(0, width + 1, (rows,), generator=self.generator).tolist()
        return [[int(t < length) for t in range(width)] for length in lengths]

    def whole(self, low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=self.generator).tolist()


def leaves(values: Any) -> Any:
    if isinstance(values, list):
        return [leaves(value) for value in values]
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients(values: Any) -> Any:
    if isinstance(values, list):
        return [gradients(value) for value in values]
    return 0.0 if values.grad is None else values.grad.item()


def numbers(values: Any) -> Any:
    return [numbers(value) for value in values] if isinstance(values, list) else values.item()


def nothing() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64, requires_grad=True)
