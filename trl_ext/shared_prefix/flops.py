"""Arithmetic that a packed forward saves, counted and not measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .model_parts import find_backbone, find_causal_lm, text_config
from .packing import Packing


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of a model, of which the backward costs twice as many again on both paths.

    Attributes:
        token: In the backbone's matrices for each token.
        prediction: In the head for each scored prediction.
        pair: In the attention of all layers for each query-key pair.
    """

    token: float
    prediction: float
    pair: float

    @classmethod
    def of(cls, model: nn.Module) -> ModelCost:
        """Counts a model's matrices; of a mixture's experts, those that a token visits."""
        lm, backbone, config = find_causal_lm(model), find_backbone(model), text_config(model)
        tables = {id(m.weight) for m in backbone.modules() if isinstance(m, nn.Embedding)}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        visited = getattr(config, "num_experts_per_tok", None) or 1
        token = 0.0
        for name, parameter in backbone.named_parameters():
            if parameter.dim() < 2 or id(parameter) in tables:
                continue
            sparse = ".experts." in f"{name}."
            token += parameter.numel() * (visited / experts if sparse else 1.0)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        head = lm.get_output_embeddings().weight
        return cls(token, float(head.numel()), 2.0 * width * heads * config.num_hidden_layers)


def flop_ratio(packing: Packing, cost: ModelCost) -> float:
    """Arithmetic of the dense path by that of the packed one.

    Dense counts padded rows, causal attention without its masked half, and the head on as many predictions as the
    rows have (TRL's head skips the others on a GPU and computes them on a CPU; the packed path skips them everywhere).
    """
    if not packing.packed_tokens:
        return 1.0
    scored = packing.predictors.numel()
    predictions = int((packing.slots < scored).sum())
    dense = cost.token * packing.dense_tokens + cost.prediction * predictions + cost.pair * packing.dense_pairs
    ours = cost.token * packing.packed_tokens + cost.prediction * scored + cost.pair * packing.layout.pairs
    return dense / ours
