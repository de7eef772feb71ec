"""From a rollout to episodes: which tokens are which step, what each step earned, and how the episode ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_ext_hooks import Turns, UsageError

from .maths import step_numbers


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


def episodes(
    loss_mask: torch.Tensor,
    turns: Turns | None,
    cut: torch.Tensor,
    outcome: torch.Tensor,
    outcome_weight: float | None,
) -> Episodes:
    """Puts together what the model wrote and what the environments gave.

    The k-th run of tokens is what the model wrote in turn k, so its reward is that of turn k. A row stops at the turn
    after which its environment is done or truncated; what the model says then is no step.

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
        turns = _silent(len(runs), max(int(runs.max()), 1), step.device)
    most = turns.rewards.shape[1]
    if int(runs.max()) > most:
        raise ValueError(f"a row has {int(runs.max())} runs of its own tokens, and its environment saw {most} turns")
    alive = (turns.done | turns.truncated).long().cumsum(1) == 0  # (b, J + 1): nothing was over before turn j
    counts = torch.minimum(runs, alive[:, :-1].sum(1))
    last = (counts - 1).clamp(min=0).unsqueeze(1)  # (b, 1)
    turn = torch.arange(most, device=step.device).expand_as(turns.rewards)
    earned = torch.where(alive[:, :-1], turns.rewards, 0.0)
    rewards = torch.zeros_like(earned).scatter_add(1, torch.minimum(turn, last), earned)
    weight = (~turns.rewarded).double() if outcome_weight is None else torch.full_like(outcome, outcome_weight)
    rewards = rewards.scatter_add(1, last, torch.where(weight == 0, 0.0, weight * outcome).unsqueeze(1))
    unscored = torch.isnan(rewards).any(dim=1) & (counts > 0)
    counts, ended = torch.where(unscored, 0, counts), ~alive[:, -1]
    return Episodes(
        step=torch.where(step < counts.unsqueeze(1), step, -1),
        counts=counts,
        rewards=torch.where(turn < counts.unsqueeze(1), rewards, 0.0)[:, : int(counts.max())],
        truncated=torch.where(ended, turns.truncated[:, -1], cut),
        dropped=torch.where(unscored, 0, runs - counts),
        unscored=unscored,
    )


def _silent(rows: int, most: int, device: torch.device) -> Turns:
    """Turns of rows without an environment."""
    never = torch.zeros(rows, most + 1, dtype=torch.bool, device=device)
    return Turns(torch.zeros(rows, most, dtype=torch.float64, device=device), never, never, never[:, 0])


def cut_short(completions: Sequence[Any]) -> list[bool]:
    """Whether a limit stopped the episode after a whole action: of calls, or of room for what the environment says.

    A row ends then with a call that the tool loop did not answer, or with an answer to which nothing could be said. A
    model that writes on to the longest length without calling is not stopped but gives up: that is an end like saying
    farewell, and has an advantage. Otherwise noise up to the limit would cost nothing, and episodes drift into it.
    """
    found = []
    for completion in completions:
        message: Mapping[str, Any] = {}
        if not isinstance(completion, str) and completion:
            message = completion[-1]
        found.append(message.get("role") == "tool" or bool(message.get("tool_calls")))
    return found


def reported(rows: Sequence[Mapping[str, Any]], loss_mask: torch.Tensor) -> Turns | None:
    """Turns that a `rollout_func` returned: lists `step_rewards` per row, with `done` and `truncated` if there are any.

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
    most = max(1, *runs)
    rewards = torch.zeros(len(rows), most, dtype=torch.float64)
    done, truncated = (torch.zeros(len(rows), most + 1, dtype=torch.bool) for _ in range(2))
    for number, row in enumerate(rows):
        rewards[number, : runs[number]] = torch.tensor(row["step_rewards"], dtype=torch.float64)
        done[number, -1], truncated[number, -1] = bool(row.get("done")), bool(row.get("truncated"))
    device = loss_mask.device
    return Turns(
        rewards.to(device),
        done.to(device),
        truncated.to(device),
        torch.ones(len(rows), dtype=torch.bool, device=device),
    )
