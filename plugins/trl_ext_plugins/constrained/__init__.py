"""Constrained RLHF: learned multipliers as reward weights (arXiv 2310.04373).

Beyond some point a higher proxy reward no longer means a better answer. Every constrained reward gets a threshold, and
the sum of rewards becomes a constrained problem: stay near the reference policy with each reward at (equality) or above
(inequality) its threshold. The weight of a reward is a Lagrange multiplier, which falls while the mean reward is above
the threshold and grows while it is below.

Advantages are normalised inside the group, in place of the authors' GAE with a value head. Their form without squashing
leaves the first multiplier out, and here all of them count.
"""

from .plugin import Constrained

__all__ = ["Constrained"]
