"""Shared-prefix forward: each token that rows of a micro-batch share is computed once, exactly.

    from trl_ext.shared_prefix import shared_prefix_logps
    logps, entropies, report = shared_prefix_logps(model, input_ids, attention_mask, logits_to_keep)

It works with any causal language model of transformers that calls its attention through transformers' attention
interface. No model file is edited, and no trainer is needed. README.md beside this file says how it works and in which
order to read the modules.
"""

from __future__ import annotations

from .attention import cascade_attention
from .attention_patch import packed_attention
from .backends import Backend, choose_backend
from .errors import BatchError, MismatchError, RefusedError, SharedPrefixError
from .flops import ModelCost, flop_ratio
from .forward import MIN_GAIN, Report, shared_prefix_logps, shared_prefix_scores
from .layout import CascadeLayout
from .model_parts import ModelParts, has_fused_head
from .packing import Packing, pack
from .paths import dense_scores, packed_logits, packed_scores
from .probes import Answers, ProbeCost, force_answers
from .refusals import why_not
from .sampled_probes import sample_answers
from .selfcheck import SelfCheck, self_check
from .traits import why_not_at_all
from .tree import MIN_RUN, PrefixTree, build_tree

__all__ = [
    "MIN_GAIN",
    "MIN_RUN",
    "Answers",
    "Backend",
    "BatchError",
    "CascadeLayout",
    "MismatchError",
    "ModelCost",
    "ModelParts",
    "Packing",
    "PrefixTree",
    "ProbeCost",
    "RefusedError",
    "Report",
    "SelfCheck",
    "SharedPrefixError",
    "build_tree",
    "cascade_attention",
    "choose_backend",
    "dense_scores",
    "flop_ratio",
    "force_answers",
    "has_fused_head",
    "pack",
    "packed_attention",
    "packed_logits",
    "packed_scores",
    "sample_answers",
    "self_check",
    "shared_prefix_logps",
    "shared_prefix_scores",
    "why_not",
    "why_not_at_all",
]
