"""Estimate of the time that is left of a run, from what its steps, evaluations and savings took so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerState

Kind = str
STEP, EVALUATION, SAVING = "step", "evaluation", "saving"


class TimeLeft:
    """Times the parts of a run, by kind.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: dict[Kind, float] = {}
        self._seconds: dict[Kind, float] = {}
        self._counts: dict[Kind, int] = {}

    def begin(self, kind: Kind) -> None:
        """Notes that a part begins. Beginning again before its end changes nothing."""
        self._began.setdefault(kind, self._clock())

    def end(self, kind: Kind) -> None:
        """Notes that a part ends. Without a beginning it does nothing."""
        if kind in self._began:
            self._seconds[kind] = self._seconds.get(kind, 0.0) + self._clock() - self._began.pop(kind)
            self._counts[kind] = self._counts.get(kind, 0) + 1

    @property
    def spent(self) -> float:
        """The seconds of all parts so far."""
        return sum(self._seconds.values())

    def left(self, ahead: Mapping[Kind, int]) -> tuple[float, bool]:
        """Returns the seconds that are left, and whether they count everything but savings, which are short.

        Args:
            ahead: How many parts of each kind lie ahead.
        """
        timed = {kind: count for kind, count in ahead.items() if kind in self._counts}
        seconds = sum(count * self._seconds[kind] / self._counts[kind] for kind, count in timed.items())
        return seconds, all(kind in timed for kind, count in ahead.items() if count and kind != SAVING)


def parts_ahead(args: Any, state: TrainerState, *, evaluates: bool, saves: bool) -> dict[Kind, int]:
    """Returns how many steps, evaluations and savings come after the current step.

    Args:
        args: TRL's arguments.
        state: The state of the trainer.
        evaluates: Whether there are data for evaluations.
        saves: Whether the model is saved after training.
    """
    at_end = args.eval_strategy == "steps" or args.eval_on_start
    evaluations = _ahead(args.eval_strategy, state.eval_steps, state, bool(at_end)) if evaluates else 0
    savings = _ahead(args.save_strategy, state.save_steps, state, args.save_strategy == "steps")
    return {
        STEP: max(0, state.max_steps - state.global_step),
        EVALUATION: evaluations,
        SAVING: savings + saves,
    }


def _ahead(strategy: str, every: float | None, state: TrainerState, at_end: bool) -> int:
    """Counts what comes at every so many steps or after every epoch, and perhaps after the last step."""
    now, last = state.global_step, state.max_steps
    if strategy == "epoch":
        return max(0, math.ceil(state.num_train_epochs) - int(state.epoch or 0))
    count = last // int(every) - now // int(every) if strategy == "steps" and every else 0
    lonely = strategy != "steps" or not every or last % int(every)
    return max(0, count) + (at_end and now < last and bool(lonely))
