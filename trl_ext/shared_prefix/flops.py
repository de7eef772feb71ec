"""FLOPs that a packed forward saves, counted from the sizes of model and batch rather than measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import nn

from .model_parts import ModelParts
from .packing import Packing


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of one forward of a model. A backward costs twice as many again, on the dense and packed path.

    Attributes:
        token: In the matrices of the backbone, per token.
        prediction: In the head, per scored prediction.
        pair: In the attention of all layers, per query-key pair.
    """

    token: float
    prediction: float
    pair: float

    @classmethod
    def of(cls, model: nn.Module | ModelParts) -> ModelCost:
        """Counts a model's matrices. Of the experts of a mixture, only those that a token visits count."""
        model_parts = ModelParts.of(model)
        backbone, config = model_parts.backbone, model_parts.text_config
        # Embedding tables are looked up and not multiplied.
        tables = {id(module.weight) for module in backbone.modules() if isinstance(module, nn.Embedding)}
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        visited = getattr(config, "num_experts_per_tok", None) or 1
        token = 0.0
        for name, parameter in backbone.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed stage 3 keeps no elements here
            if len(shape) < 2 or id(parameter) in tables:
                continue
            is_expert = ".experts." in f"{name}."
            token += prod(shape) * (visited / experts if is_expert else 1.0)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        # A pair takes a product of query and key, and one of probability and value, each over the width of a head.
        pair = 2.0 * width * heads * config.num_hidden_layers
        return cls(token, float(model_parts.vocabulary * config.hidden_size), pair)


def flop_ratio(packing: Packing, cost: ModelCost) -> float:
    """Divides the arithmetic of the dense path by that of the packed path.

    The dense path is charged for its padding, for causal attention without the masked half, and for the head on as many
    predictions as the rows have. TRL's head skips all other positions on a GPU, but computes them on a CPU. The packed
    path skips them everywhere.
    """
    if not packing.packed_tokens:
        return 1.0
    scored = packing.predictors.numel()
    # Rows that share a prediction share a slot. On the dense path each of these rows computes it.
    dense_predictions = int((packing.slots < scored).sum())
    dense = cost.token * packing.dense_tokens + cost.prediction * dense_predictions + cost.pair * packing.dense_pairs
    packed = cost.token * packing.packed_tokens + cost.prediction * scored + cost.pair * packing.layout.pairs
    return dense / packed
