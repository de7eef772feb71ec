"""DECS: decoupled rewards and curriculum data scheduling (arXiv 2509.25827), against overthinking.

A length penalty on whole answers punishes useful exploration in long ones and still rewards redundant tokens in short
ones. DECS has a judge find the necessary prefix of every correct completion: it ends with the first chunk that already
states the right answer. The tokens behind it get a lower reward, and rewards are normalised per token position inside
the group. The penalty acts only through prompts that are always answered right, so their number per round is limited.

Stages: advantages (one per token), keep_rows. The loss stays the trainer's. Deviations from the authors' code: a
completion is cut at the end of its thinking before it is cut into chunks, so that the answer is never redundant. kappa
is clipped as in the paper. Positions where all rewards are equal give exactly 0. A round without a usable completion
leaves kappa alone, where the code divides by 0. Prompts that are left out are not replaced by sampling more.
"""

from .plugin import DECS

__all__ = ["DECS"]
