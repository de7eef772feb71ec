"""DECS: decoupled rewards and curriculum data scheduling (arXiv 2509.25827), against overthinking.

A length penalty on whole answers punishes useful exploration in long ones and still rewards redundant tokens in short
ones. DECS has a judge find the necessary prefix of every correct completion, up to the first chunk that already states
the right answer; gives the tokens behind it a lower reward; normalises per token position inside the group; and limits
how many prompts that are always answered right a round may hold, because only through them the penalty acts.

Stages: advantages (one per token), keep_rows. The loss stays the trainer's. Against the authors' code: a completion is
cut at the end of its thinking before it is cut into chunks, so that the answer is never redundant; kappa is clipped as
in the paper; positions where all rewards are equal give exactly 0; a round without a usable completion leaves kappa
alone, where the code divides by 0; prompts that are left out are not replaced by sampling more.
"""

from .plugin import DECS, DECSOptions

__all__ = ["DECS", "DECSOptions"]
