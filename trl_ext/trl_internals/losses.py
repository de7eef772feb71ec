"""How a trainer's own loss averages, scales and adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from trl_ext_hooks import TrainerKind

from ..errors import CompatError
from .trainer_state import mode


def loss_divisor(trainer: Any, kind: TrainerKind) -> float:
    """Returns what a mean over a micro-batch is divided by.

    GRPO scales for accumulation itself, and the other trainers leave that to transformers.
    """
    if kind == "grpo" and mode(trainer) == "train":
        return float(trainer.current_gradient_accumulation_steps)
    return 1.0


def router_loss(trainer: Any, kind: TrainerKind, aux_loss: torch.Tensor) -> torch.Tensor:
    """Returns the load-balancing term of a mixture of experts as TRL adds it to the loss of a micro-batch."""
    return trainer.router_aux_loss_coef * aux_loss / loss_divisor(trainer, kind)


LossUnit = Literal["tokens", "rows", "micro_batch"]


def loss_unit(trainer: Any, kind: TrainerKind) -> LossUnit:
    """Returns what the trainer's own loss divides by: tokens of the round, rows, or what a micro-batch holds."""
    loss_type = trainer.loss_type if kind == "grpo" else "rows"
    if loss_type in ("dapo", "cispo", "vespo"):
        return "tokens"
    return "micro_batch" if loss_type == "bnpo" else "rows"


def adds_to_loss(trainer: Any) -> str | None:
    """Names a term that the trainer adds to its loss with a mean of its own, and its setting. Returns None if none."""
    if getattr(trainer.args, "entropy_coef", None) or getattr(trainer.args, "use_adaptive_entropy", False):
        return "an entropy bonus (entropy_coef, use_adaptive_entropy)"
    return "the router's auxiliary loss (output_router_logits)" if getattr(trainer, "aux_loss_enabled", False) else None


def aggregate(
    trainer: Any, kind: TrainerKind, values: torch.Tensor, mask: torch.Tensor, batch: Mapping[str, Any]
) -> torch.Tensor:
    """Averages (m, T) token losses as the trainer's own loss does, scaled for accumulation.

    GRPO follows `loss_type`; RLOO adds up each row and averages over rows.
    """
    if kind != "grpo":
        return (values * mask).sum(dim=1).mean()
    loss_type, training = trainer.loss_type, mode(trainer) == "train"
    if loss_type in ("dapo", "cispo", "vespo"):
        # the count spans the generation batch of all processes, so it is rescaled to one accumulation window
        items = batch["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
        if training:
            items = items * trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
        return (values * mask).sum() / items
    if loss_type in ("grpo", "sapo"):
        loss = ((values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)).mean()
    elif loss_type == "bnpo":
        loss = (values * mask).sum() / mask.sum().clamp(min=1.0)
    elif loss_type == "dr_grpo":
        loss = (values * mask).sum() / (values.size(0) * trainer.max_completion_length)
    elif loss_type == "luspo":
        loss = (values * mask).sum(dim=1).mean()
    else:
        raise CompatError(
            f"loss_type {loss_type!r} has no known normalisation; use another normalisation or loss_type."
        )
    return loss / loss_divisor(trainer, kind)
