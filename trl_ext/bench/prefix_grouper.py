"""Completion log-probabilities by the package PrefixGrouper, in three forms.

Its documentation splits the logits of the packed row. In two better forms, which are ours, the hidden states are split
and the head runs on completions only: once TRL's fused head, as in a trainer, and once plain logits, which on a CPU are
faster than TRL's head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

Form = Literal["documented", "fused", "logits"]


def grouped_logps(model: nn.Module, ids: torch.Tensor, shape: tuple[int, int, int], form: Form) -> torch.Tensor:
    """Computes log-probabilities of completions, (G, S).

    Args:
        model: The model.
        ids: (G, P + S). All rows begin with the same prompt.
        shape: P, G and S.
        form: Which form.
    """
    from prefix_grouper import PrefixGrouper

    prompt, group, completion = shape
    prefix_mask = ids.new_ones(1, prompt)
    suffix_mask = ids.new_ones(group, completion)
    grouper = PrefixGrouper.from_ungrouped_masks(prefix_mask, suffix_mask, group, padding_mode="right")
    packed = grouper.concat_input(ids[:1, :prompt], prefix_mask, ids[:, prompt:], suffix_mask)
    suffix = torch.arange(prompt, prompt + completion, device=ids.device)
    positions = torch.cat([torch.arange(prompt, device=ids.device), *[suffix] * group])[None]
    inputs: dict[str, Any] = {"position_ids": positions, "use_cache": False, "trl_ext_grouper": grouper}

    def predictors(packed: torch.Tensor) -> torch.Tensor:
        # hidden states or logits that predict a completion token: the last of the prompt, and all but the last
        return grouper.split_output(packed, include_prefix_last=1)[2][:, :-1]  # (G, S, ...)

    def keep_predictors(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = predictors(output.last_hidden_state).flatten(0, 1)[None]
        return output

    backbone: Any = model.base_model
    labels = ids[:, prompt:]
    if form == "fused":
        handle = backbone.register_forward_hook(keep_predictors)
        try:
            with _grouped_attention(model):
                output = model(packed, shift_labels=labels.reshape(1, -1), fused_lm_head=True, **inputs)
        finally:
            handle.remove()
        return output.log_probs.reshape(labels.shape)
    with _grouped_attention(model):
        if form == "documented":
            logits = predictors(model(packed, **inputs).logits).float()
        else:
            hidden = backbone(packed, **inputs).last_hidden_state
            logits = model.get_output_embeddings()(predictors(hidden)).float()  # type: ignore[operator]
    return logits.gather(-1, labels[..., None]).squeeze(-1) - logits.logsumexp(-1)


@contextlib.contextmanager
def _grouped_attention(model: nn.Module) -> Iterator[None]:
    """Gives the model PrefixGrouper's attention over transformers' SDPA during the block."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    masks: dict[tuple[int, int], torch.Tensor | None] = {}

    def inner(query: Any, key: Any, value: Any, mask: Any, module: Any, **kwargs: Any) -> Any:
        rows, columns = query.shape[2], key.shape[2]
        if (rows, columns) not in masks:
            causal = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
            masks[rows, columns] = None if rows == columns else causal[None, None]
        return sdpa(module, query, key, value, masks[rows, columns], **kwargs)[0]

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return kwargs.pop("trl_ext_grouper").forward(inner, query, key, value, module, **kwargs), None

    config: Any = model.config
    previous = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("trl_ext_prefix_grouper", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("trl_ext_prefix_grouper", lambda *args, **kwargs: None)
    config._attn_implementation = "trl_ext_prefix_grouper"
    try:
        yield
    finally:
        config._attn_implementation = previous
