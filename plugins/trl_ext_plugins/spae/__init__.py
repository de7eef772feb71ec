"""SPAE: step potential advantage estimation (arXiv 2601.03823), credit per reasoning step.

An outcome reward cannot tell a useful deduction from checking once more what is already known. SPAE asks the policy at
the end of every step for its answer so far, a probe that nothing is trained on. How sure that answer is (Conf) and how
likely the right one is (Acc) make the step's potential. Where it has been high before, the outcome advantage is damped;
where it rises, there is a bonus; the result is normalised over the tokens of the batch.

Stages: advantages (one per token), keep_rows. The loss stays the trainer's. Of the authors' code only a script with the
probe is public. Its Conf and Acc divide by the answer's length a second time, so that answers of several tokens never
count as known; here they are the paper's means. What the paper's text leaves open is marked `ours` in the options.
"""

from .plugin import SPAE, SPAEOptions

__all__ = ["SPAE", "SPAEOptions"]
