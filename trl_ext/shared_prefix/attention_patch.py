"""Attention patch: gives a transformers model cascade attention for one forward, without touching its code.

transformers looks up its attention function by the name in a model's configuration. An attention function of our own is
registered there, together with a mask function that builds no mask. During a packed forward every configuration of the
model holds our name. Afterwards each one gets its own back, so that generation and all other forwards are unaffected.

Gradient checkpointing runs a layer's forward a second time during the backward, when the names are long restored. So
while the context is open, the checkpoint functions of the modules are wrapped: the function that a checkpoint keeps for
the second run enters the same patch again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import cascade_attention
from .backends import Backend, choose_backend
from .errors import RefusedError, SharedPrefixError
from .last_layer import last_feed_forward, only_rows
from .layout import CascadeLayout
from .model_parts import ModelParts

NAME = "trl_ext_shared_prefix"
# Where transformers, and torch's checkpoint wrapper, keep the checkpoint function of a module.
_CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")
# The patch whose forward is running. The attention function has no other way to learn of the layout.
_active_patch: ContextVar[AttentionPatch | None] = ContextVar("trl_ext_shared_prefix", default=None)


class AttentionPatch:
    """The patch of one model for one packed forward.

    Attributes:
        layout: Where the nodes lie.
        backend: The kernels, chosen when the first layer calls its attention. None until then.
        dtype: The dtype that attention computes in, known from the same moment on.
        attention_calls: How many attention calls were served, those of recomputed layers included.
    """

    def __init__(
        self, model_parts: ModelParts, layout: CascadeLayout, backend: str | None, rows: torch.Tensor | None
    ) -> None:
        self.layout = layout
        self.backend: Backend | None = None
        self.dtype: torch.dtype | None = None
        self.attention_calls = 0
        self._model_parts = model_parts
        self._requested_backend = backend
        self._rows = rows
        self._last_feed_forward = None if rows is None else last_feed_forward(model_parts.backbone)

    def choose_backend(self, query: torch.Tensor, value: torch.Tensor, softcap: bool) -> Backend:
        """Returns the kernels for these tensors. The choice of the first layer holds for all layers."""
        if self.backend is None:
            device = query.device
            autocast = torch.is_autocast_enabled(device.type)
            self.dtype = torch.get_autocast_dtype(device.type) if autocast else value.dtype
            head_dim = max(query.shape[-1], value.shape[-1])
            self.backend = choose_backend(
                device, self.dtype, head_dim=head_dim, softcap=softcap, name=self._requested_backend
            )
        return self.backend

    @property
    def backend_name(self) -> str | None:
        """Returns the name of the kernels that ran, None if no attention was called."""
        return None if self.backend is None else self.backend.name

    @contextmanager
    def active(self) -> Iterator[None]:
        """Makes the model's attention the cascade over this layout while the context is open."""
        if _active_patch.get() is self:
            # A checkpointed layer in its first run: the forward is already patched.
            yield
            return
        configs = self._model_parts.configs
        implementations = [config._attn_implementation_internal for config in configs]
        token = _active_patch.set(self)
        try:
            for config in configs:
                config._attn_implementation_internal = NAME
            with self._last_layer_reduced():
                yield
        finally:
            for config, implementation in zip(configs, implementations, strict=True):
                config._attn_implementation_internal = implementation
            _active_patch.reset(token)

    def _last_layer_reduced(self) -> AbstractContextManager[None]:
        """Returns a context in which the last feed-forward part sees only the rows that are wanted."""
        if self._rows is None:
            return nullcontext()
        return only_rows(self._last_feed_forward, self._rows, self.layout.length)

    @contextmanager
    def checkpoints_wrapped(self) -> Iterator[None]:
        """Makes checkpointed functions enter `active` again in their second run.

        Only the forward needs this context. The checkpoints that it creates keep what they need for the backward.
        """
        originals = []
        try:
            for module in self._model_parts.modules:
                for attribute in _CHECKPOINT_ATTRIBUTES:
                    checkpoint = vars(module).get(attribute)
                    if callable(checkpoint):
                        originals.append((module, attribute, checkpoint))
                        setattr(module, attribute, partial(_checkpoint_patched, checkpoint, self))
            yield
        finally:
            for module, attribute, checkpoint in originals:
                setattr(module, attribute, checkpoint)


@contextmanager
def packed_attention(
    model: nn.Module | ModelParts,
    layout: CascadeLayout,
    backend: str | None = None,
    rows: torch.Tensor | None = None,
) -> Iterator[AttentionPatch]:
    """Gives `model` cascade attention while the context is open, for a forward on one packed row of this layout.

    Args:
        model: A transformers model, wrapped or not, or its parts.
        layout: From `pack`.
        backend: Name of the kernels, None for the best that can serve.
        rows: (R,) the only packed tokens whose last hidden states are wanted, without repetition, None for all. The
            last hidden states of the other tokens are meaningless.
    """
    patch = AttentionPatch(ModelParts.of(model), layout, backend, rows)
    register()
    with patch.active(), patch.checkpoints_wrapped():
        yield patch


def register() -> None:
    """Registers the attention function and the mask function with transformers. Calling it again changes nothing."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)


def _checkpoint_patched(
    checkpoint: Callable[..., Any], patch: AttentionPatch, layer: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls a checkpoint function on a layer that enters the patch each time it runs."""
    return checkpoint(partial(_run_patched, patch, layer), *args, **kwargs)


def _run_patched(patch: AttentionPatch, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a layer inside the patch."""
    with patch.active():
        return layer(*args, **kwargs)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Builds no mask, as the layout says what each token attends to."""
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
    """Serves as transformers' attention function.

    It takes `query` (1, H, N, D) with `key` and `value` (1, Hkv, N, D), and returns (1, N, H, D).
    """
    patch = _active_patch.get()
    if patch is None:
        raise SharedPrefixError(
            f"Attention implementation {NAME!r} was called outside a packed forward. Only shared_prefix_logps and "
            "packed_attention set it, and a forward in another thread (DataParallel) does not see it."
        )
    # The last guard. What no configuration shows is seen here, in what the layer asks its attention for.
    window = sliding_window if sliding_window is not None else kwargs.get("chunk_size")
    longest = patch.layout.longest
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    unsupported = {
        "a batch of packed rows": query.shape[0] != 1,
        "keys of other tokens (a cache or cross-attention)": key.shape[2] != query.shape[2],
        "a mask": attention_mask is not None,
        f"attention dropout of {dropout}": dropout > 0,
        "attention in both directions": not causal,
        f"a window of {window} for rows of {longest}": window is not None and longest > window,
        "attention sinks": kwargs.get("s_aux") is not None,
        "a position bias": kwargs.get("position_bias") is not None,
    }
    for feature, requested in unsupported.items():
        if requested:
            raise RefusedError(f"{type(module).__name__} asks for {feature}, which cascade attention does not support.")
    backend = patch.choose_backend(query, value, softcap is not None)
    patch.attention_calls += 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return cascade_attention(q, k, v, patch.layout, backend, scaling, softcap)[None], None
