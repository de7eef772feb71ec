"""Thinkless with DeGRPO: learning when to think (arXiv 2505.13379).

A model opens every answer with a control token, `<short>` for a direct answer or `<think>` for a long one. In GRPO this
one token drowns among hundreds of others, and with a mean per sequence it weighs more in short answers than in long
ones. DeGRPO averages the loss over control tokens and over all other tokens apart, and weighs the first by alpha.

The surrogate loss is positively homogeneous in the advantage, so both means are weights (b, T) on the advantages. The
trainer's own loss, with its clipping, KL term, entropy bonus and importance correction, stays as it is.

Differences from the authors' code: the means are taken over the whole round instead of each micro-batch. An empty mean
is 0 instead of NaN. The mode of an answer is its first token, not found by a search for `<short>` in the text. The KL
term is not clamped at 10. A group of one has no advantage.
"""

from .plugin import Thinkless
from .rewards import boxed_match, boxed_reward, mode_reward
from .tokens import add_control_tokens, warmup_rows

__all__ = [
    "Thinkless",
    "add_control_tokens",
    "boxed_match",
    "boxed_reward",
    "mode_reward",
    "warmup_rows",
]
