"""Gives a transformers model cascade attention for the time of one forward, without touching its code.

The attention function and a mask function that builds no mask are registered with transformers under one name. For a
packed forward every configuration of the model names that implementation, and gets its own back afterwards, so that
generation and every other forward stay what they were.

Gradient checkpointing runs a layer's forward once more in the backward, when the implementation is long restored. So
while the context is open the checkpoint functions of the modules are wrapped: the function they remember enters the
same context again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import cascade_attention
from .backends import Backend, choose_backend
from .errors import RefusedError, SharedPrefixError
from .last_layer import last_feed_forward, only_rows
from .layout import CascadeLayout
from .model_parts import find_backbone

NAME = "trl_ext_shared_prefix"
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
_active: ContextVar[Entry | None] = ContextVar("trl_ext_shared_prefix", default=None)


class Entry:
    """One packed forward: its layout, its kernels, and the configurations to switch.

    Attributes:
        layout: Where the nodes lie.
        backend: The kernels, once the first layer has chosen them.
        dtype: The type that attention computes in, known from then on as well.
        layers: How many attention calls were served, recomputed ones included.
    """

    def __init__(self, model: nn.Module, layout: CascadeLayout, backend: str | None, rows: torch.Tensor | None) -> None:
        self.layout = layout
        self.backend: Backend | None = None
        self.dtype: torch.dtype | None = None
        self.layers = 0
        self._asked = backend
        self._rows = rows
        self._last = None if rows is None else last_feed_forward(find_backbone(model))
        self._modules = list(model.modules())
        self._configs = _all_configs(self._modules)

    def choose(self, query: torch.Tensor, value: torch.Tensor, softcap: bool) -> Backend:
        """The kernels for these tensors, the same ones for all layers."""
        if self.backend is None:
            device = query.device
            autocast = torch.is_autocast_enabled(device.type)
            self.dtype = torch.get_autocast_dtype(device.type) if autocast else value.dtype
            self.backend = choose_backend(
                device, self.dtype, head_dim=query.shape[-1], softcap=softcap, name=self._asked
            )
        return self.backend

    @property
    def kernels(self) -> str | None:
        """Name of the kernels."""
        return None if self.backend is None else self.backend.name

    @contextmanager
    def attention(self) -> Iterator[None]:
        """While open, this model's attention is the cascade over this layout."""
        if _active.get() is self:  # a checkpointed layer, run for the first time
            yield
            return
        before = [config._attn_implementation_internal for config in self._configs]
        token = _active.set(self)
        try:
            for config in self._configs:
                config._attn_implementation_internal = NAME
            with nullcontext() if self._rows is None else only_rows(self._last, self._rows, self.layout.length):
                yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = implementation
            _active.reset(token)

    @contextmanager
    def checkpoints(self) -> Iterator[None]:
        """While open, checkpointed functions remember to enter `attention` again when they are run once more."""
        wrapped = []
        try:
            for module in self._modules:
                for attribute in _CHECKPOINT_ATTRIBUTES:
                    function = vars(module).get(attribute)
                    if callable(function):
                        wrapped.append((module, attribute, function))
                        setattr(module, attribute, partial(_checkpoint, function, self))
            yield
        finally:
            for module, attribute, function in wrapped:
                setattr(module, attribute, function)


@contextmanager
def packed_attention(
    model: nn.Module, layout: CascadeLayout, backend: str | None = None, rows: torch.Tensor | None = None
) -> Iterator[Entry]:
    """While open, a forward of `model` on one packed row of this layout has cascade attention.

    Args:
        model: A transformers model, wrapped or not.
        layout: From `pack`.
        backend: Name of the kernels, None for the best that runs.
        rows: (R,) the only packed tokens whose last hidden state is wanted, without repetition; None for all. The
            others come out meaningless.
    """
    register()
    entry = Entry(model, layout, backend, rows)
    with entry.attention(), entry.checkpoints():
        yield entry


def register() -> None:
    """Makes the attention and mask functions known to transformers. Calling it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def _checkpoint(function: Callable[..., Any], entry: Entry, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(partial(_enter_and_run, entry, run), *args, **kwargs)


def _enter_and_run(entry: Entry, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with entry.attention():
        return run(*args, **kwargs)


def _all_configs(modules: list[nn.Module]) -> list[PretrainedConfig]:
    found: dict[int, PretrainedConfig] = {}

    def add(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                add(getattr(config, name, None))

    for module in modules:
        add(getattr(module, "config", None))
    return list(found.values())


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: `query` (1, H, N, D), `key` and `value` (1, Hkv, N, D) to (1, N, H, D)."""
    entry = _active.get()
    if entry is None:
        raise SharedPrefixError(
            f"Attention implementation {NAME!r} was called outside a packed forward. It is set only by "
            "shared_prefix_logps and packed_attention; a forward in another thread (DataParallel) does not see it."
        )
    window = sliding_window if sliding_window is not None else kwargs.get("chunk_size")
    longest = entry.layout.longest
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    reasons = {
        "a batch of packed rows": query.shape[0] != 1,
        "keys of other tokens (a cache or cross-attention)": key.shape[2] != query.shape[2],
        "a mask": attention_mask is not None,
        f"attention dropout of {dropout}": dropout > 0,
        "attention in both directions": not causal,
        f"a window of {window} for rows of {longest}": window is not None and longest > window,
        "attention sinks": kwargs.get("s_aux") is not None,
        "a position bias": kwargs.get("position_bias") is not None,
    }
    for reason, given in reasons.items():
        if given:
            raise RefusedError(f"{type(module).__name__} asks for {reason}, which cascade attention does not have.")
    backend = entry.choose(query, value, softcap is not None)
    entry.layers += 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return cascade_attention(q, k, v, entry.layout, backend, scaling, softcap)[None], None
