"""Adapters of a PEFT policy that serve as its reference: which ones can, and the frozen copy of a trained one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

ADAPTER = "ref"
"""TRL's name for the frozen copy of an adapter."""


def check_config(config: Any, plugin: str) -> None:
    """Refuses an adapter whose training moves the reference too, before there is a model.

    Args:
        config: The `peft_config` of a trainer, or None.
        plugin: Who needs a reference, for the error.
    """
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ConfigError(
            f"plugin {plugin!r} needs a reference policy, which is the model without its adapter, and bias={bias!r} in "
            f"the peft_config trains biases of the model itself. Set bias='none'."
        )


def check(policy: Any, plugin: str) -> None:
    """Refuses adapters whose training moves the reference too."""
    wanted = f"plugin {plugin!r} needs a reference policy"
    if policy.active_adapter == ADAPTER:
        raise ConfigError(
            f"{wanted}, which TRL keeps in an adapter called {ADAPTER!r}, and the adapter that trains has that name. "
            f"Load it under another name."
        )
    marks = {*policy.peft_config, "prompt_encoder"}
    prefix = getattr(policy.base_model, "prefix", None)
    for name, value in policy.named_parameters():
        held = bool(marks & set(name.split("."))) or (prefix is not None and prefix in name)
        if value.requires_grad and not held:
            raise ConfigError(
                f"{wanted}, which is the model without what training adds, and {name} of the model itself is trained "
                f"as well. Freeze it: a LoRA adapter needs bias='none'."
            )


def adds_nothing(policy: Any) -> bool:
    """Whether the adapters in use leave the model as it is, as a new LoRA adapter does: its factor B is 0."""
    active = set(policy.base_model.active_adapters) if _is_tuner(policy) else set()
    values = [(name, value) for name, value in policy.named_parameters() if active & set(name.split("."))]
    return bool(values) and all(
        "lora_A" in name
        or "lora_embedding_A" in name
        or (("lora_B" in name or "lora_embedding_B" in name) and value.numel() > 0 and not value.any())
        for name, value in values
    )


def complete(policy: Any) -> Callable[[], None]:
    """Copies what TRL's copy of the adapter leaves out: values whose name ends with that of the adapter, as in IA3.

    Returns:
        The undo.
    """
    values = _tensors(policy)
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, value in values.items():
        head, _, last = name.rpartition(".")
        source = values.get(f"{head}.{policy.active_adapter}")
        if last == ADAPTER and source is not None and source.shape == value.shape:
            before.append((value, value.data))
            value.data = source.data.clone()

    def undo() -> None:
        for value, data in before:
            value.data = data

    return undo


def _is_tuner(policy: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTuner

    return isinstance(policy.base_model, BaseTuner)


def add_copy(policy: Any, plugin: str) -> None:
    """Adds a frozen copy of the adapter in use, under TRL's name for it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    wanted = f"plugin {plugin!r} needs a reference policy, a frozen copy of the trained adapter"
    active = policy.active_adapter
    if _is_tuner(policy) and len(policy.base_model.active_adapters) > 1:
        raise ConfigError(
            f"{wanted}, and several adapters are active ({', '.join(policy.base_model.active_adapters)}). Merge the "
            f"others into the model first, or combine them with add_weighted_adapter."
        )
    trained = {name: value.requires_grad for name, value in policy.named_parameters()}
    buffers = {name for name, _ in policy.named_buffers()}
    config = copy.deepcopy(policy.peft_config[active])
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # other ways to begin, such as PiSSA, change the weights of the model
    try:
        policy.add_adapter(ADAPTER, config)
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{wanted}, which PEFT cannot add: {error} Merge the adapter into the model with merge_and_unload, and "
            f"give the trainer that model with a new adapter in `peft_config`."
        ) from error
    values = _tensors(policy)
    for name, value in values.items():
        if name in trained:
            value.requires_grad_(trained[name])
        elif name not in buffers:
            source = values.get(".".join(active if part == ADAPTER else part for part in name.split(".")))
            if source is None or source.shape != value.shape:
                remove_copy(policy)
                raise ConfigError(f"{wanted}, and the adapter {active!r} has nothing that matches {name}.")
            value.data = source.data.clone()
            value.requires_grad_(False)
    for layer in policy.modules():
        scaling = getattr(layer, "scaling", None) if isinstance(layer, BaseTunerLayer) else None
        if isinstance(scaling, dict) and active in scaling:
            scaling[ADAPTER] = scaling[active]


def remove_copy(policy: Any) -> None:
    """Removes the copy of an adapter, if it is still there."""
    if ADAPTER in policy.peft_config:
        policy.delete_adapter(ADAPTER)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
