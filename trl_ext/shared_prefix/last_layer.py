"""Last layer: its feed-forward part is spared the tokens that predict nothing.

The last hidden state of a token matters only if it predicts something. Other tokens, such as those inside a prompt,
serve the last layer by their keys and values alone. So the feed-forward part of that layer, which is the larger half of
it, runs on the predictors only. The other tokens get zeros there, which reach neither a log-probability nor a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def last_feed_forward(backbone: nn.Module) -> nn.Module | None:
    """Returns the feed-forward part of the last layer if the model names it `layers[-1].mlp`, as most do, else None."""
    layers = getattr(backbone, "layers", None)
    mlp = getattr(layers[-1], "mlp", None) if isinstance(layers, nn.ModuleList) and len(layers) else None
    return mlp if isinstance(mlp, nn.Module) else None


@contextmanager
def only_rows(module: nn.Module | None, rows: torch.Tensor, length: int) -> Iterator[None]:
    """Lets `module` see only some tokens while the context is open, and fills its output with zeros elsewhere.

    Args:
        module: A module that treats each token by itself. With None nothing happens.
        rows: (R,) indices of the tokens, without repetition.
        length: Number of tokens of the packed row. Calls with inputs other than (1, length, hidden) are left alone.
    """
    if module is None or len(rows) == length:
        yield
        return
    # Set by the first hook for the second one: whether the input of the present call was reduced.
    reduced = False

    def select_rows(module: nn.Module, args: Any) -> Any:
        """Hands the module the wanted rows of its input."""
        nonlocal reduced
        reduced = len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].shape[:2] == (1, length)
        return (args[0].index_select(1, rows.to(args[0].device)),) if reduced else None

    def restore_rows(module: nn.Module, args: Any, output: Any) -> Any:
        """Puts the output's rows back in their places among zeros."""
        if not reduced:
            return None
        # A mixture of experts may return its router's logits behind the hidden states.
        hidden, *others = output if isinstance(output, tuple) else (output,)
        full = hidden.new_zeros(1, length, hidden.shape[-1]).index_copy(1, rows.to(hidden.device), hidden)
        return (full, *others) if isinstance(output, tuple) else full

    handles = [module.register_forward_pre_hook(select_rows), module.register_forward_hook(restore_rows)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
