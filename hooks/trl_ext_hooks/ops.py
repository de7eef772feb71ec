"""Tensor functions of the toolkit under one short name: `from trl_ext_hooks import ops`."""

from .toolkit.groups import GroupStats, group_normalize, group_pairs, group_stats, label_ids, subgroup_ids
from .toolkit.losses import clipped_surrogate, importance_ratio, masked_mean, scale_gradient, sequence_log_ratio
from .toolkit.messages import count_executed_calls, count_tag, count_tool_messages
from .toolkit.tokens import align_tokens, predicting

__all__ = [
    "GroupStats",
    "align_tokens",
    "clipped_surrogate",
    "count_executed_calls",
    "count_tag",
    "count_tool_messages",
    "group_normalize",
    "group_pairs",
    "group_stats",
    "importance_ratio",
    "label_ids",
    "masked_mean",
    "predicting",
    "scale_gradient",
    "sequence_log_ratio",
    "subgroup_ids",
]
