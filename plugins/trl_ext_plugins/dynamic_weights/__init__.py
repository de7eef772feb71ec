"""Dynamic reward weighting for several objectives (arXiv 2509.11452).

Fixed weights of rewards find one point of the trade-off, and none on a part of its front that is not convex. The paper
moves the pressure during training, in two ways. `hypervolume` measures all objectives, and gives a step more weight
after a measurement that extends the front found so far. `gradient` moves weight to rewards whose policy gradient agrees
with those of the others.

Stages: advantages (hypervolume); rewards, loss_terms and optimizer_step (gradient). Deviations from the authors' code:
the hypervolume multiplies advantages, because a factor of all rewards cancels in GRPO's normalisation. Points below the
reference are moved to it, where the authors' sum of boxes goes wrong. Objectives are measured in deviations of their
rewards. New weights apply from the next round on, so that no round is scored twice.
"""

from .plugin import DynamicWeights

__all__ = ["DynamicWeights"]
