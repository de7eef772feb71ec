"""Polychromic: rewards sets of completions that are good and use different strategies (arXiv 2509.25424).

A policy that is paid for single completions ends with one way to the answer. Here a set of `n` completions of a prompt
scores its mean reward times its share of different strategies. A completion's advantage is the mean score of the sets
that hold it, minus the mean score of all sets. A function of the user names the strategy of every completion.

The paper trains control policies with PPO and branches its episodes. This is the form for single completions, in which
all sets of a group take part. Their mean has a closed form, so that no set is drawn or listed.
"""

from .maths import UNNAMED, SetScores, polychromic_advantages, set_scores
from .plugin import Polychromic

__all__ = ["UNNAMED", "Polychromic", "SetScores", "polychromic_advantages", "set_scores"]
