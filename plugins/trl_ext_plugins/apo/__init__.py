"""APO: Accelerated Preference Optimization (arXiv 2410.06293).

Iterative DPO samples from the current model, labels, and trains with that model as start and reference, round after
round. APO moves each start a little further along the way from the output of the round before the last to the last
output (Nesterov's extrapolation), at no cost in data or training, and needs fewer rounds. The released model is the
output of the last round, which is not extrapolated.

Not to be confused with Anchored Preference Optimization (arXiv 2408.06266), which TRL has as the losses `apo_zero` and
`apo_down`.

There is no code by the authors. The paper's theory extrapolates policies in log space. Its experiments extrapolate
weights, and so does this plugin (see `maths`). With an adapter the change of the weights is extrapolated, not its
factors: every round trains a new adapter on a merged start.

`maths` extrapolates, `pairs` samples and makes the pairs of a round, `preparation` checks and records a run, and
`plugin` runs the rounds.
"""

from .maths import coefficients, extrapolate
from .pairs import collect, load_judge, sample, wins
from .plugin import APO
from .preparation import begin

__all__ = ["APO", "begin", "coefficients", "collect", "extrapolate", "load_judge", "sample", "wins"]
