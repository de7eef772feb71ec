"""Second models beside the policy of a DPO run: loaded, frozen, prepared as TRL prepares its reference, and scored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError


def load(trainer: Any, path: str) -> Any:
    """Loads a frozen causal language model with TRL's fused head, in the policy's precision and attention.

    Args:
        trainer: The DPO trainer that the model is for.
        path: A folder or a model of the hub; or a PEFT adapter, which is merged into its base.

    Raises:
        ConfigError: It cannot be loaded, or its tokenizer is not the policy's.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.models.utils import prepare_deepspeed, prepare_fsdp
    from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

    policy = trainer.accelerator.unwrap_model(trainer.model)
    settings = {"dtype": policy.dtype, "attn_implementation": policy.config._attn_implementation}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            from peft import AutoPeftModelForCausalLM

            model: Any = AutoPeftModelForCausalLM.from_pretrained(path, **settings).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(path, **settings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the model {path!r} cannot be loaded with its tokenizer: {error}") from error
    own = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if tokenizer.get_vocab() != own.get_vocab():
        raise ConfigError(
            f"the model {path!r} has another vocabulary ({len(tokenizer)} tokens) than the policy ({len(own)} tokens), "
            f"so it cannot score the policy's tokens. Choose a model of the same family."
        )
    model.requires_grad_(False)
    disable_dropout_in_model(model)
    add_fused_lm_head(model)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    if trainer.is_fsdp_enabled:
        return prepare_fsdp(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True).eval()


def score(trainer: Any, model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Returns (2n, L-1) log-probabilities of a batch of pairs under a frozen model, 0 outside the completions."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    known = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), trainer.accelerator.autocast():
        found: torch.Tensor = model(**known, labels=labels, use_cache=False, fused_lm_head=True).log_probs
    return found
