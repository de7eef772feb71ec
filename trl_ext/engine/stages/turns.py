"""What environments give turn by turn: the need `turns`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from trl_ext_hooks import Turns

from ...errors import PluginError
from ...trl_internals import trainer_state
from ..context import Context, Poll


@contextlib.contextmanager
def reading(context: Context) -> Iterator[None]:
    """Reads environments during the block, which is one generation of all rows with its tool calls."""
    if "turns" not in context.plan.needs:
        yield
        return
    state = context.current_round()
    state.polls, state.turns = [], None
    try:
        yield
        read(context)
        state.turns = between(state.polls, context.view.device)
    finally:
        state.polls = None


def read(context: Context) -> None:
    """Reads the environments of all rows, at the beginning of a turn and at the end of the last."""
    if context.round is None or context.round.polls is None:
        return
    environments = trainer_state.environments(context.trainer)
    if environments:
        context.round.polls.append([poll(each) for each in environments])


def poll(environment: Any) -> Poll:
    """Reads one environment.

    Raises:
        PluginError: Its reward is not a number.
    """
    total, name = getattr(environment, "total_reward", None), "total_reward"
    if total is None:
        total, name = getattr(environment, "step_rewards", None), "step_rewards"
    try:
        reward = None if total is None else float(sum(total) if name == "step_rewards" else total)
    except (TypeError, ValueError):
        wanted = "numbers" if name == "step_rewards" else "a number"
        raise PluginError(
            f"the environment {type(environment).__name__} has {name} = {total!r}, expected {wanted}."
        ) from None
    done, truncated = (bool(getattr(environment, flag, False)) for flag in ("done", "truncated"))
    return Poll(reward, done, truncated)


def between(polls: Sequence[Sequence[Poll]], device: torch.device) -> Turns | None:
    """Makes J turns of J + 1 readings of b environments. Returns None if there are no environments."""
    if not polls:
        return None
    rows = list(zip(*polls, strict=True))  # b rows of J + 1 readings
    totals = torch.tensor([[each.reward or 0.0 for each in row] for row in rows], dtype=torch.float64)
    rewards = totals.diff(dim=1)
    rewards[~torch.isfinite(rewards)] = torch.nan
    return Turns(
        rewards=rewards.to(device),
        done=torch.tensor([[each.done for each in row] for row in rows], device=device),
        truncated=torch.tensor([[each.truncated for each in row] for row in rows], device=device),
        rewarded=torch.tensor([row[0].reward is not None for row in rows], device=device),
    )
