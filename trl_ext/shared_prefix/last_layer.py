"""Spares the last layer the tokens that nobody asks for.

A shared token that predicts nothing serves the last layer by its key and value alone. The feed-forward part of that
layer, the larger half of it, is therefore run on the tokens that make predictions; the others get zeros, which reach
neither a log-probability nor a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def last_feed_forward(backbone: nn.Module) -> nn.Module | None:
    """The feed-forward part of the last layer, where a model names it as most do: `layers[-1].mlp`."""
    layers = getattr(backbone, "layers", None)
    part = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) and len(layers) else None
    return part if isinstance(part, nn.Module) else None


@contextmanager
def only_rows(module: nn.Module | None, rows: torch.Tensor, length: int) -> Iterator[None]:
    """While open, `module` gets these rows of its input (1, length, hidden), and its output has zeros elsewhere.

    Args:
        module: Works on each token for itself; None for nothing to do.
        rows: (R,) indices without repetition.
        length: Tokens of the packed row. Calls with other inputs are left alone.
    """
    if module is None or len(rows) == length:
        yield
        return
    short = False

    def before(module: nn.Module, args: Any) -> Any:
        nonlocal short
        short = len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].shape[:2] == (1, length)
        return (args[0].index_select(1, rows.to(args[0].device)),) if short else None

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not short:
            return None
        first, *rest = output if isinstance(output, tuple) else (output,)
        full = first.new_zeros(1, length, first.shape[-1]).index_copy(1, rows.to(first.device), first)
        return (full, *rest) if isinstance(output, tuple) else full

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
