"""SPAE: step potential advantage estimation (arXiv 2601.03823), credit per reasoning step.

An outcome reward cannot tell a useful deduction from checking once more what is already known. SPAE asks the policy for
its answer so far at the end of every step. Nothing is trained on this probe. How sure that answer is (Conf) and how
likely the right one is (Acc) make the step's potential. Where it has been high before, the outcome advantage is damped.
Where it rises, there is a bonus. The result is normalised over the tokens of the batch.

Stages: advantages (one per token), keep_rows. The loss stays the trainer's. The authors published a script with the
probe only. Its Conf and Acc divide by the answer's length a second time, so that answers of several tokens never count
as known; here they are the paper's means. What the paper's text leaves open is marked `ours` in the options.
"""

from .plugin import SPAE

__all__ = ["SPAE"]
