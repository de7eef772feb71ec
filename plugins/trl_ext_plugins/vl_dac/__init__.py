"""VL-DAC: vision-language decoupled actor-critic (arXiv 2508.04280), for agents that act in environments.

A group advantage of the whole trajectory gives every token of an episode the same noisy credit. VL-DAC is PPO in which
the ratio is clipped per action token and the value is learned once per environment step: a small network reads the
hidden state before the step's first token, without a gradient into the policy. GAE runs over steps, and the tokens of a
step share its advantage. A step is a turn of the model: a run of its own tokens between the results of tools.

Stages: annotations of the core (turns of environments, hidden states), advantages (one per token), policy_loss, a loss
term for the value, optimizer_step. Deviations from the authors' code: the first token of an action is trained too.
Advantages are normalised over all processes. The real loss mask is used instead of the token id 0. Log-probabilities
and values are float32. Sampling is at the temperature of the scoring. No action is run in place of one that cannot be
read. As in their code and unlike in the paper, the KL term is k3 against the frozen start, the value loss is clipped
and has no 1/2, and steps with a ratio above 10 use the clipped term alone. The state is the growing transcript of TRL's
tool loop, not a fresh prompt with the last images.
"""

from .plugin import VLDAC

__all__ = ["VLDAC"]
