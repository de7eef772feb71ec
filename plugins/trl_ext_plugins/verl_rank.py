"""VERL: Velocity-Exploiting Rank-Learning (arXiv 2509.23808), not the framework of that name.

The effective rank of a completion's hidden states says how many directions its tokens explore. VERL follows how this
rank grows along the completion: its velocity and its acceleration. Completions whose rank, or whose velocity, is above
a running average get a bonus, which is a share of their advantage. The acceleration decides which of the two counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trl_ext_hooks import Config, Curve, Plugin, Requirement, Round, UsageError, Views, Warn, hookimpl, option


def effective_rank(states: torch.Tensor) -> torch.Tensor:
    """Returns exp(-sum q log q), q = singular values / their sum, of states (L, d) centred over tokens: 0-d float64.

    The singular values are square roots of the eigenvalues of the smaller Gram matrix, L x L or d x d. Those below its
    rounding error count as 0. Fewer than two tokens have the rank 0, and equal ones the rank 1.
    """
    if len(states) < 2:
        return states.new_zeros((), dtype=torch.float64)
    if not torch.isfinite(states).all():  # on one process only, so nothing may be raised here
        return states.new_full((), torch.nan, dtype=torch.float64)
    centred = states.double()
    centred = centred - centred.mean(dim=0)
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    energy = torch.linalg.eigvalsh(gram)  # ascending
    noise = len(gram) * torch.finfo(energy.dtype).eps * energy[-1]
    singular = torch.where(energy > noise, energy, 0.0).clamp(min=0.0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(energy.dtype).tiny)
    return torch.special.entr(share).sum().exp()


def checkpoints(length: int, stride: int) -> range:
    """Returns the tokens stride, 2 * stride, ... < length, counted from 0, after which the rank is taken."""
    return range(stride, length, stride)


def prefix_ranks(states: torch.Tensor, stride: int) -> torch.Tensor:
    """Returns the effective rank of the states (L, d) up to each of C checkpoints, that token included: (C,)."""
    ranks = [effective_rank(states[: last + 1]) for last in checkpoints(len(states), stride)]
    return torch.stack(ranks) if ranks else states.new_zeros(0, dtype=torch.float64)


def rank_changes(ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns velocity and acceleration of the ranks (C,) of growing prefixes, 0 where there are too few.

    The velocity at a checkpoint is its rank - the mean of the earlier ones. Both results are means: of the velocities,
    and of the differences of successive velocities.
    """
    nothing = ranks.new_zeros(())
    if len(ranks) < 2:
        return nothing, nothing
    counts = torch.arange(1, len(ranks), device=ranks.device)
    velocities = ranks[1:] - ranks.cumsum(0)[:-1] / counts
    return velocities.mean(), velocities.diff().mean() if len(velocities) > 1 else nothing


def relative_deviation(
    values: torch.Tensor, averages: torch.Tensor, *, clamp: float = 5.0, eps: float = 1e-8
) -> torch.Tensor:
    """Returns (value - average) / (|average| + eps), cut at +-clamp."""
    return ((values - averages) / (averages.abs() + eps)).clamp(-clamp, clamp)


def rank_signal(
    measures: torch.Tensor, averages: torch.Tensor, *, gain: float = 2.0, clamp: float = 5.0, eps: float = 1e-8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns how much a row explores, b (N,), and its signal, b tanh(d(rank)) + (1 - b) tanh(d(velocity)): (N,).

    b = sigmoid(gain * d(acceleration)), and d is `relative_deviation` from the averages.

    Args:
        measures: (N, 3) rank, velocity and acceleration.
        averages: (3,) their running averages.
    """
    rank, velocity, acceleration = relative_deviation(measures, averages, clamp=clamp, eps=eps).unbind(dim=1)
    explore = torch.sigmoid(gain * acceleration)
    return explore, explore * rank.tanh() + (1 - explore) * velocity.tanh()


def shaped(advantages: torch.Tensor, signal: torch.Tensor, *, kappa: float = 2.0) -> torch.Tensor:
    """Returns A + min(relu(signal), |A| / kappa) of advantages (N,) or (N, T) with a signal that broadcasts."""
    return advantages + torch.minimum(signal.clamp(min=0.0).to(advantages.dtype), advantages.abs() / kappa)


def moved(averages: Sequence[float], measures: torch.Tensor, share: float) -> list[float]:
    """Returns (1 - share) * average + share * mean of the measures (N, 3) of a step: three numbers."""
    return [(1 - share) * old + share * new for old, new in zip(averages, measures.mean(dim=0).tolist(), strict=True)]


class VERLRank(Plugin):
    name = "verl-rank"
    paper = "arXiv 2509.23808"
    bibtex = """@misc{verl2025,
      title = {{Beyond the Exploration-Exploitation Trade-off: A Hidden State Approach for LLM Reasoning in RLVR}},
      eprint = {2509.23808},
      archivePrefix = {arXiv},
      year = {2025},
    }"""
    summary = "raises advantages of completions whose hidden states gain rank faster than a running average"
    trainers = ("grpo", "rloo")
    state = ("averages",)

    @dataclass(frozen=True)
    class Options:
        stride: int = option(40, ge=1, help="tokens from one measurement of the rank to the next", source="train.sh")
        gain: float = option(2.0, gt=0, help="how sharply the acceleration decides", source="train.sh")
        kappa: float = option(2.0, gt=0, help="the bonus is at most |advantage| / kappa", source="paper, train.sh")
        ema: float = option(0.3, gt=0, le=1, help="weight of a step in the running averages", source="train.sh")
        weight: float = option(
            1.0, ge=0, help="factor of the bonus before it is cut; 0 = measure only", source="train.sh"
        )
        window: int | None = option(
            512, ge=2, help="last tokens that velocity and acceleration look at; null = all", source="authors' code"
        )

    options: Options

    def start(self) -> None:
        self.averages: list[float] | None = None  # of rank, velocity and acceleration, once a step was recorded

    @hookimpl
    def configure(self, config: Config) -> Iterator[Requirement]:
        longest, needed = config.args.max_completion_length, 3 * self.options.stride + 1
        window = self.options.window or longest
        if min(longest, window) < needed:
            yield Warn(
                f"{min(longest, window)} tokens are too few for an acceleration with verl-rank.stride="
                f"{self.options.stride}, which takes {needed}; lower the stride"
            )

    @hookimpl
    def hidden_positions(self, loss_mask: torch.Tensor) -> torch.Tensor:
        # The forward after sampling comes last before `advantages`. Rows that only fill up still have tokens in it.
        self.lengths: list[int] = loss_mask.count_nonzero(dim=1).tolist()
        return loss_mask != 0

    @hookimpl
    def advantages(self, round: Round) -> torch.Tensor | None:
        states = round.hidden_states[self.name].split(self.lengths)
        # of the local rows, at their checkpoints
        self.ranks = [prefix_ranks(self._window(row), self.options.stride) for row in states]
        own = [
            torch.stack([effective_rank(row), *rank_changes(ranks)])
            for row, ranks in zip(states, self.ranks, strict=True)
        ]
        # The last digits of an eigenvalue depend on where a matrix lies in memory. Those of float32 do not.
        measures = round.trainer.gather(torch.stack(own).float())  # (N, 3)
        if measures.isnan().any():
            raise UsageError(
                "hidden states of completions are not finite, so the training has diverged. Lower learning_rate, or "
                "train in bfloat16 or float32."
            )
        for name, column in zip(("rank", "velocity", "acceleration"), measures[round.local].T, strict=True):
            round.log(name, column)
        before = self.averages
        if round.mode == "train":
            real = measures[round.group_ids >= 0]
            self.averages = moved(before, real, self.options.ema) if before else real.mean(dim=0).tolist()
        return None if before is None else self._shape(round, measures, before)

    def _window(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the last tokens of a completion, those that velocity and acceleration look at."""
        return tokens if self.options.window is None else tokens[-self.options.window :]

    def _shape(self, round: Round, measures: torch.Tensor, averages: Sequence[float]) -> torch.Tensor:
        explore, signal = rank_signal(measures, measures.new_tensor(averages), gain=self.options.gain)
        signal = self.options.weight * signal
        base = round.advantages
        if base.dim() == 2:  # an earlier plugin made one per token of this process
            signal = signal[round.local].unsqueeze(1)
        after = shaped(base, signal, kappa=self.options.kappa)
        round.log("explore", explore[round.local])
        round.log("signal", signal)
        round.log("raised", (after > base).double())
        return after

    @hookimpl
    def inspect(self, round: Round) -> Views:
        curves = []
        for row, ranks in enumerate(self.ranks):
            tokens = self._window((round.loss_mask[row] != 0).nonzero().flatten()).tolist()
            if len(ranks):
                places = [tokens[place] for place in checkpoints(len(tokens), self.options.stride)]
                curves.append(Curve(row, "effective rank", places, ranks.tolist()))
        return Views(curves=curves)
