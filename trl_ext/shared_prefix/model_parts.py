"""Finds the parts of a model, whatever wraps it: PEFT, DistributedDataParallel, FSDP, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .errors import RefusedError


def find_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model with a language-model head inside `model`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise RefusedError(
        f"{type(model).__name__} holds no transformers model with a language-model head; shared prefixes need one."
    )


def find_backbone(model: nn.Module) -> nn.Module:
    """The module that turns tokens into the hidden states that the head projects."""
    lm = find_causal_lm(model)
    backbone = lm.base_model
    if backbone is lm or not isinstance(backbone, nn.Module):
        raise RefusedError(
            f"{type(lm).__name__} has no backbone apart from its head (its base_model is the model itself), so the "
            "hidden states cannot be picked. Load the text-only model, or turn shared prefixes off for it."
        )
    return backbone


def text_config(model: nn.Module) -> Any:
    """The configuration of the language part."""
    return find_causal_lm(model).config.get_text_config()


def has_fused_head(model: nn.Module) -> bool:
    """Whether TRL's `add_fused_lm_head` was applied to the model inside."""
    function = vars(find_causal_lm(model)).get("forward")
    while function is not None:
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The type that attention computes in: autocast's if it is on, else that of the embedding."""
    weight = embedding(model)
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def model_device(model: nn.Module) -> torch.device:
    """Where the tokens go in."""
    return embedding(model).device


def embedding(model: nn.Module) -> torch.Tensor:
    """The weight of the token embedding, (vocabulary, hidden)."""
    weight = find_causal_lm(model).get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, every module is in evaluation mode; each gets its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
