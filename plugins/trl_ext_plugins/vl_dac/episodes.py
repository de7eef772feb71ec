"""Episodes of a rollout: which tokens are which step, what each step earned, and how the episode ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext_hooks import Turns, UsageError

from .maths import first_tokens, step_numbers


@dataclass(frozen=True)
class Episodes:
    """The steps of b rows; K is the largest number of steps of a row on this process.

    Attributes:
        step: (b, T) int64: number of each token's step, -1 on tokens of none.
        counts: (b,) int64: steps of each row.
        rewards: (b, K) float64, 0 behind a row's last step.
        truncated: (b,) bool: the last step was ended by a limit.
        dropped: (b,) int64: turns after the end of the episode, which are no steps.
        unscored: (b,) bool: a reward of the row is not a number, so it has no steps.
    """

    step: torch.Tensor
    counts: torch.Tensor
    rewards: torch.Tensor
    truncated: torch.Tensor
    dropped: torch.Tensor
    unscored: torch.Tensor

    @property
    def exists(self) -> torch.Tensor:
        """(b, K) bool."""
        return torch.arange(self.rewards.shape[1], device=self.counts.device) < self.counts.unsqueeze(1)

    @property
    def last(self) -> torch.Tensor:
        """(b, K) bool: the last step of each row."""
        return torch.arange(self.rewards.shape[1], device=self.counts.device) == self.counts.unsqueeze(1) - 1

    def of_steps(self, at_starts: torch.Tensor) -> torch.Tensor:
        """Picks (b, K) values of steps from (b, T) values at their first tokens; 0 where no step is."""
        starts = first_tokens(self.step >= 0)
        row = starts.nonzero()[:, 0]
        values = torch.zeros(self.rewards.shape, dtype=at_starts.dtype, device=at_starts.device)
        values[row, self.step[starts]] = at_starts[starts]
        return values

    def on_tokens(self, of_steps: torch.Tensor) -> torch.Tensor:
        """Spreads (b, K) values of steps over their tokens (b, T); 0 on tokens of none."""
        if not of_steps.shape[1]:
            return torch.zeros(self.step.shape, dtype=of_steps.dtype, device=self.step.device)
        return torch.where(self.step >= 0, of_steps.gather(1, self.step.clamp(min=0)), 0.0)


def episodes(
    loss_mask: torch.Tensor,
    turns: Turns | None,
    cut: torch.Tensor,
    outcome: torch.Tensor,
    outcome_weight: float | None,
) -> Episodes:
    """Joins what the model wrote with what the environments gave.

    The k-th run of tokens is what the model wrote in turn k, so its reward is that of turn k. A row stops at the turn
    after which its environment is done or truncated. What the model says after that is not a step.

    Args:
        loss_mask: (b, T), 1 on tokens that the model wrote.
        turns: Rewards and ends; None without an environment.
        cut: (b,) bool: the model was stopped by a limit before it had finished.
        outcome: (b,) float64: the sum of the reward functions, NaN where none applies.
        outcome_weight: Factor with which the outcome is added to the last step. None: 1 where nobody told step rewards,
            else 0.
    """
    step = step_numbers(loss_mask)
    runs = step.amax(dim=1) + 1  # (b,)
    if turns is None:
        turns = _silent_turns(len(runs), max(int(runs.max()), 1), step.device)
    most = turns.rewards.shape[1]
    if int(runs.max()) > most:
        raise ValueError(f"a row has {int(runs.max())} runs of its own tokens, and its environment saw {most} turns")
    alive = (turns.done | turns.truncated).long().cumsum(1) == 0  # (b, J + 1): nothing was over before turn j
    counts = torch.minimum(runs, alive[:, :-1].sum(1))
    last = (counts - 1).clamp(min=0).unsqueeze(1)  # (b, 1)
    turn = torch.arange(most, device=step.device).expand_as(turns.rewards)
    # What an environment paid after the last run of tokens belongs to that run.
    paid = torch.where(alive[:, :-1], turns.rewards, 0.0)
    rewards = torch.zeros_like(paid).scatter_add(1, torch.minimum(turn, last), paid)
    weight = (~turns.rewarded).double() if outcome_weight is None else torch.full_like(outcome, outcome_weight)
    # An outcome of NaN matters only where it counts.
    rewards = rewards.scatter_add(1, last, torch.where(weight == 0, 0.0, weight * outcome).unsqueeze(1))
    unscored = torch.isnan(rewards).any(dim=1) & (counts > 0)
    counts, ended = torch.where(unscored, 0, counts), ~alive[:, -1]
    return Episodes(
        step=torch.where(step < counts.unsqueeze(1), step, -1),
        counts=counts,
        rewards=torch.where(turn < counts.unsqueeze(1), rewards, 0.0)[:, : int(counts.max())],
        truncated=torch.where(ended, turns.truncated[:, -1], cut),  # an end that the environment told wins
        dropped=torch.where(unscored, 0, runs - counts),
        unscored=unscored,
    )


def _silent_turns(rows: int, most: int, device: torch.device) -> Turns:
    """Returns the turns of rows without an environment."""
    never = torch.zeros(rows, most + 1, dtype=torch.bool, device=device)
    return Turns(torch.zeros(rows, most, dtype=torch.float64, device=device), never, never, never[:, 0])


def cut_short(completions: Sequence[Any]) -> list[bool]:
    """Tells for each completion whether a limit stopped the episode after a whole action.

    The limit is one of calls, or of room for what the environment says. A row then ends with a call that the tool loop
    did not answer, or with an answer to which nothing could be said. A model that writes on to the longest length
    without calling is not stopped: it gives up. That is an end like saying farewell, and has an advantage. Otherwise
    noise up to the limit would cost nothing, and episodes would drift into it.
    """
    flags = []
    for completion in completions:
        message: Mapping[str, Any] = {}
        if not isinstance(completion, str) and completion:
            message = completion[-1]
        flags.append(message.get("role") == "tool" or bool(message.get("tool_calls")))
    return flags


def reported(rows: Sequence[Mapping[str, Any]], loss_mask: torch.Tensor) -> Turns | None:
    """Returns the turns that a `rollout_func` told: lists `step_rewards` per row, with `done` and `truncated` if any.

    Raises:
        UsageError: A row has another number of rewards than of runs of its own tokens.
    """
    if not rows or any(row.get("step_rewards") is None for row in rows):
        return None
    runs = (step_numbers(loss_mask).amax(dim=1) + 1).tolist()
    for number, (row, count) in enumerate(zip(rows, runs, strict=True)):
        if len(row["step_rewards"]) != count:
            raise UsageError(
                f"row {number} of the rollout_func has {len(row['step_rewards'])} step_rewards for {count} runs of its "
                f"own tokens in env_mask; return one reward per run"
            )
    turns = _silent_turns(len(rows), max(1, *runs), torch.device("cpu"))
    rewards, done, truncated = turns.rewards, turns.done.clone(), turns.truncated.clone()
    for number, row in enumerate(rows):
        rewards[number, : runs[number]] = torch.tensor(row["step_rewards"], dtype=torch.float64)
        done[number, -1], truncated[number, -1] = bool(row.get("done")), bool(row.get("truncated"))
    device = loss_mask.device
    rewarded = torch.ones(len(rows), dtype=torch.bool, device=device)
    return Turns(rewards.to(device), done.to(device), truncated.to(device), rewarded)
