"""Control tokens of a tokenizer and a model, and the texts of a short supervised stage that teaches them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def token_id(tokenizer: Any, token: str) -> int | None:
    """Returns the id of a text that is one token of its own, else None."""
    ids = tokenizer.encode(token, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def add_control_tokens(
    model: Any, tokenizer: Any, tokens: Sequence[str] = ("<think>", "</think>", "<short>")
) -> list[str]:
    """Adds the missing ones of some tokens to a tokenizer and a model, as ordinary tokens with mean embeddings.

    They must not be special tokens, which TRL removes from the texts that reward functions see. Save both afterwards.
    The model has to learn the new tokens before reinforcement learning can use them.

    Returns:
        The tokens that were added.
    """
    missing = [token for token in tokens if token_id(tokenizer, token) is None]
    if not missing:
        return []
    tokenizer.add_tokens(missing)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(missing)
    layers = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    with torch.no_grad():
        for weight in {id(layer.weight): layer.weight for layer in layers}.values():  # they may share one
            weight[ids] = weight[: min(ids)].mean(dim=0)
    return missing


def warmup_rows(
    example: Mapping[str, Any], *, think: str = "<think>", short: str = "<short>", close: str = "</think>"
) -> list[dict[str, str]]:
    """Makes the two texts of one paired example for supervised training: a direct and a long completion of a prompt.

    Args:
        example: `prompt`, `short` (the direct answer) and `think` (thoughts, then `</think>`, then the answer), as
            text. An opening control token is added where it is missing.
        think, short, close: The tokens.

    Returns:
        Two rows with `prompt` and `completion`.
    """
    if close not in example["think"]:
        raise ValueError(f"the long answer to {example['prompt']!r} has no {close!r}: {example['think']!r}")
    rows = []
    for token, text in ((short, example["short"]), (think, example["think"])):
        rows.append({"prompt": example["prompt"], "completion": text if text.startswith(token) else token + text})
    return rows
