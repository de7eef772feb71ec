"""DRPO and DisCO: right answers against wrong ones of the same prompt, inside a trust region.

DisCO, discriminative constrained optimisation (arXiv 2505.12366), raises the scores of right answers above those of
wrong ones. A score is the mean log-probability of a completion's tokens, or their mean ratio. No advantage is
normalised, so easy and hard prompts count alike, and nothing is clipped. A penalty holds the KL of an update below a
limit.

DRPO, decoupled reward policy optimisation (arXiv 2510.04474), also weighs the right answers of a prompt by their
length, among themselves. So a preference for short answers never pushes a right answer down, however long it is.

Both couple the rows of a group, and the constraint couples all rows of an update. The hook `step_statistics` sees them
all, on every process, and gives each row the derivative of the objective by its score. So the gradient is exact however
the rows are spread over micro-batches and processes.
"""

from .plugin import DRPO, DisCO

__all__ = ["DRPO", "DisCO"]
