"""A micro-batch inside the loss: the trainer's clip range."""

from __future__ import annotations

import types

import pytest
import torch

from trl_ext_hooks import Loss


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"epsilon": 0.2, "epsilon_high": 0.28}, (0.2, 0.28)),
        ({"epsilon": 0.2, "epsilon_high": None}, (0.2, 0.2)),
        ({"epsilon": 0.1}, (0.1, 0.1)),
        ({"epsilon": 0.2, "epsilon_high": 0.0}, (0.2, 0.0)),
    ],
)
def test_the_clip_range(args: dict[str, float | None], expected: tuple[float, float]) -> None:
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(**args))
    assert Loss("train", 0, trainer, {}, torch.zeros(1, 1), None).clip_range == expected  # type: ignore[arg-type]
