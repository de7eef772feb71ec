"""Model parts: the causal LM, backbone, embeddings and head inside a model, whatever wraps it.

A trainer may hand over a model inside PEFT, DistributedDataParallel, FSDP or `torch.compile`. Each public function of
this package searches the model once, at its entrance, and passes the resulting `ModelParts` on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PretrainedConfig, PreTrainedModel

from .errors import RefusedError


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The parts of one model that the shared-prefix forward works with.

    What can change during a call, such as devices and dtypes, is a property and is read when it is needed.

    Attributes:
        model: The model as the caller gave it, wrappers included. Forwards call this module.
        causal_lm: The transformers model with a language-model head inside `model`.
        embeddings: The module that embeds the input tokens.
        head: The module that projects hidden states to logits.
        text_config: The configuration of the language part.
        has_fused_head: Whether TRL's `add_fused_lm_head` was applied to `causal_lm`.
        modules: Every module of `model`, wrappers included.
        configs: Every transformers configuration that these modules hold, sub-configurations included.
    """

    model: nn.Module
    causal_lm: PreTrainedModel
    embeddings: nn.Module
    head: nn.Module
    text_config: Any
    has_fused_head: bool
    modules: tuple[nn.Module, ...]
    configs: tuple[PretrainedConfig, ...]

    @classmethod
    def of(cls, model: nn.Module | ModelParts) -> ModelParts:
        """Searches a model for its parts. Parts found before are returned as they are."""
        return model if isinstance(model, ModelParts) else _search(model)

    @property
    def backbone(self) -> nn.Module:
        """Returns the module that turns tokens into the hidden states that the head projects.

        Raises:
            RefusedError: The model has no backbone apart from its head. The dense path still serves it.
        """
        backbone = self.causal_lm.base_model
        if backbone is self.causal_lm or not isinstance(backbone, nn.Module):
            raise RefusedError(
                f"{self.class_name} has no backbone apart from its head (its base_model is the model itself), so its "
                "hidden states cannot be selected. Load the text-only model, or turn shared prefixes off for it."
            )
        return backbone

    @property
    def decoder(self) -> nn.Module:
        """Returns the part of the backbone that reads text, without towers for images and sounds."""
        decoder = self.causal_lm.get_decoder()
        return decoder if isinstance(decoder, nn.Module) else self.backbone

    @property
    def class_name(self) -> str:
        """Returns the name of the causal LM's class, for messages."""
        return type(self.causal_lm).__name__

    @property
    def embedding_weight(self) -> torch.Tensor:
        """Returns the weight of the token embedding, (vocabulary, hidden)."""
        weight = self.embeddings.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def device(self) -> torch.device:
        """Returns the device that input tokens belong on."""
        return self.embedding_weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Returns the dtype that attention computes in: autocast's if it is on, else that of the embedding."""
        weight = self.embedding_weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    @property
    def vocabulary(self) -> int:
        """Returns the number of tokens, by the configuration. A sharded weight has the shape of a shard, or none."""
        return int(self.text_config.vocab_size)

    @property
    def is_sharded(self) -> bool:
        """Returns whether parameters are split over processes (FSDP, DeepSpeed stage 3)."""
        if any(isinstance(module, FullyShardedDataParallel) for module in self.modules):
            return True
        return any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in self.model.parameters())

    @property
    def adapters(self) -> dict[str, Any]:
        """Returns the configurations of PEFT's active adapters, by name."""
        configs: dict[str, Any] = {}
        active: set[str] = set()
        for module in self.modules:
            # PEFT's wrapper has the configurations, and so has the model inside it.
            is_wrapper = hasattr(module, "get_base_model")
            held: Any = module.peft_config if is_wrapper else vars(module).get("peft_config")
            if isinstance(held, dict):
                configs |= held
                # An adapter that learns prompts has no layers that could name it.
                if is_wrapper and any(config.is_prompt_learning for config in held.values()):
                    active.add(str(module.active_adapter))
            names: Any = vars(module).get("_active_adapter")
            if names and not vars(module).get("_disable_adapters"):
                active.update([names] if isinstance(names, str) else names)
        return {name: config for name, config in configs.items() if name in active}

    @property
    def accelerators(self) -> list[torch.device]:
        """Returns the devices other than the CPU that hold parameters."""
        devices = {parameter.device for parameter in self.model.parameters()}
        return sorted((device for device in devices if device.type not in ("cpu", "meta")), key=str)

    def to_check(self) -> ModelParts:
        """Returns the same parts with the module to call for a check.

        It keeps whatever may change results, such as an adapter's wrapper. A data-parallel wrapper would wait for a
        backward that never comes, and a compiled model would be compiled anew for the shapes of the check, so what is
        inside them is called. Only the wrapper of a sharded model can gather its parameters.
        """
        if self.is_sharded:
            return self
        model = self.model
        while (inner := _inside(model)) is not None:
            model = inner
        return self if model is self.model else replace(self, model=model, modules=tuple(model.modules()))

    def of_causal_lm(self) -> ModelParts:
        """Returns the same parts with the causal LM itself as the module to call."""
        return replace(self, model=self.causal_lm, modules=tuple(self.causal_lm.modules()))

    def text_only_arguments(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what a model of text and images needs to be told about tokens that are all text."""
        forward = signature(type(self.causal_lm).forward).parameters
        names = [name for name in ("token_type_ids", "mm_token_type_ids") if name in forward]
        if self.causal_lm.config is self.text_config:
            return {}
        return {name: torch.zeros_like(input_ids) for name in names}


def has_fused_head(model: nn.Module) -> bool:
    """Returns whether TRL's `add_fused_lm_head` was applied to the model, wrapped or not."""
    return ModelParts.of(model).has_fused_head


def evaluating(model_parts: ModelParts) -> AbstractContextManager[None]:
    """Puts every module into evaluation mode while the context is open, then restores each module's own mode."""
    return _in_mode(model_parts, training=False)


def training(model_parts: ModelParts) -> AbstractContextManager[None]:
    """Puts every module into training mode while the context is open, then restores each module's own mode."""
    return _in_mode(model_parts, training=True)


@contextmanager
def _in_mode(model_parts: ModelParts, training: bool) -> Iterator[None]:
    """Puts every module into a mode while the context is open."""
    modes = [(module, module.training) for module in model_parts.modules]
    model_parts.model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def random_states(model_parts: ModelParts) -> list[torch.Tensor]:
    """Returns the states of the random generators of the CPU and of the model's other devices."""
    states = [torch.get_rng_state()]
    for device in model_parts.accelerators:
        module = torch.get_device_module(device)
        states.append(module.get_rng_state() if device.type == "mps" else module.get_rng_state(device))
    return states


@contextmanager
def untouched_random_state(model_parts: ModelParts) -> Iterator[None]:
    """Gives the random generators of the CPU and of the model's devices their state back at the end."""
    cpu_state, *states = random_states(model_parts)
    devices = model_parts.accelerators
    try:
        yield
    finally:
        torch.set_rng_state(cpu_state)
        for device, state in zip(devices, states, strict=True):
            module = torch.get_device_module(device)
            module.set_rng_state(state) if device.type == "mps" else module.set_rng_state(state, device)


def _inside(model: nn.Module) -> nn.Module | None:
    """Returns the module inside a wrapper that changes no results, None if there is no such wrapper."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        inner = model.module
    elif type(model).__name__ in ("OptimizedModule", "DeepSpeedEngine"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    else:
        return None
    return inner if isinstance(inner, nn.Module) else None


def _search(model: nn.Module) -> ModelParts:
    """Walks through a model once and collects its parts."""
    modules = tuple(model.modules())
    # The first match is the outermost one. A multimodal model may hold a second causal LM further inside.
    for module in modules:
        if not isinstance(module, PreTrainedModel):
            continue
        head = module.get_output_embeddings()
        if head is not None:
            return ModelParts(
                model=model,
                causal_lm=module,
                embeddings=module.get_input_embeddings(),
                head=head,
                text_config=module.config.get_text_config(),
                has_fused_head=_forward_is_fused(module),
                modules=modules,
                configs=_collect_configs(modules),
            )
    raise RefusedError(
        f"{type(model).__name__} contains no transformers model with a language-model head, which shared prefixes need."
    )


def _forward_is_fused(causal_lm: PreTrainedModel) -> bool:
    """Returns whether the model's `forward` was replaced by the one of TRL's `add_fused_lm_head`."""
    # TRL sets the new forward on the instance. Others, such as accelerate, may have wrapped it again since, so the
    # chain of `__wrapped__` is followed. TRL's function is recognised by its local variable.
    function = vars(causal_lm).get("forward")
    while function is not None:
        code = getattr(getattr(function, "__func__", function), "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def _collect_configs(modules: Iterable[nn.Module]) -> tuple[PretrainedConfig, ...]:
    """Returns each configuration of the modules once, by identity. Layers may hold copies of the model's own."""
    configs: dict[int, PretrainedConfig] = {}

    def add(config: Any) -> None:
        """Adds a configuration and those nested in it."""
        if isinstance(config, PretrainedConfig) and id(config) not in configs:
            configs[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in modules:
        add(getattr(module, "config", None))
    return tuple(configs.values())
