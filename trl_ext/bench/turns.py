"""Trainers that take turns in one process, one training step each in rotating order, and the times of the steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any


def step_times(
    trainers: Mapping[str, Any],
    progress: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Trains all trainers to their end, in turns, so that changes in the speed of the machine affect all of them.

    Args:
        trainers: Trainers with the same number of steps.
        progress: Called with the number of finished rounds.
        clock: Read before and after a step. `time.process_time` counts what the process computed, whatever else the
            machine did. Only one trainer works at a time.

    Returns:
        Seconds of every step, by trainer.
    """
    turns = _Turns(list(trainers), progress)
    times: dict[str, list[float]] = {name: [] for name in trainers}
    threads = []
    for name, trainer in trainers.items():
        trainer.add_callback(_callback(turns, name, times[name], clock))
        threads.append(threading.Thread(target=turns.guard, args=(trainer.train,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if turns.error is not None:
        raise turns.error
    return times


class _Turns:
    """Lets threads run one step each, in rotating order."""

    def __init__(self, names: list[str], progress: Callable[[int], None]) -> None:
        self.names, self.progress = names, progress
        self.condition = threading.Condition()
        self.taken = 0
        self.error: BaseException | None = None

    def order(self, turn: int) -> str:
        """Returns whose turn it is. The order shifts by one every round."""
        shift, place = divmod(turn, len(self.names))
        return self.names[(place + shift) % len(self.names)]

    def wait(self, name: str) -> None:
        """Waits for the turn of a trainer.

        Raises:
            RuntimeError: Another trainer failed.
        """
        with self.condition:
            self.condition.wait_for(lambda: self.order(self.taken) == name or self.error is not None)
            if self.error is not None:
                raise RuntimeError("another arm failed")

    def done(self) -> None:
        """Ends a turn."""
        with self.condition:
            self.taken += 1
            self.progress(self.taken // len(self.names))
            self.condition.notify_all()

    def guard(self, train: Callable[[], Any]) -> None:
        """Trains, and ends all others with the first error."""
        try:
            train()
        except BaseException as error:
            with self.condition:
                self.error = self.error or error
                self.condition.notify_all()


def _callback(turns: _Turns, name: str, times: list[float], clock: Callable[[], float]) -> Any:
    from transformers import TrainerCallback

    class Turn(TrainerCallback):
        start = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.wait(name)
            self.start = clock()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(clock() - self.start)
            turns.done()

    return Turn()
