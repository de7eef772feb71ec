"""The progress of a comparison for people: how many runs are done, what runs now, and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..support.console import bars
from ..support.tables import duration
from .runs import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

LINE_EVERY = 15.0
"""Seconds between two lines about runs that go on, where there is no terminal."""
_WIDTH = 80
"""Width of such a line."""


class ProgressDisplay:
    """Shows bars in a terminal. Elsewhere it prints a line for every start and end, and one now and then in between.

    Args:
        total: Number of runs of the comparison.
        done: Runs that were there before.
        console: Where to write.
        expected: Arm -> seconds that a run is expected to take. Empty where nothing is known.
        at_once: Number of runs at a time.
    """

    def __init__(
        self, total: int, done: int, console: Console, expected: Mapping[str, float] | None = None, at_once: int = 1
    ) -> None:
        self.total, self.before, self.done = total, done, done
        self.console = console
        self.expected = sum(expected.values()) / len(expected) if expected else None
        self.at_once = max(1, min(at_once, total - done))
        self.began = self._last_line = time.monotonic()
        self.begun = done
        self.shares: dict[str, float] = {}
        self.states: dict[str, str] = {}
        self.bars: dict[str, TaskID] = {}
        self.progress = bars(console)
        self.whole = self.progress.add_task("all runs", total=total, completed=done, note=self._note())

    def __enter__(self) -> ProgressDisplay:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def started(self, run: Run) -> None:
        """Adds a bar for a run whose process starts."""
        self.begun += 1
        self.shares[run.key] = 0.0
        self.states[run.key] = f"{run}: starting"
        self.bars[run.key] = self.progress.add_task(f"  {run}", total=1.0, note="starting")
        if not self.console.is_terminal:
            self._print(f"[{self.begun}/{self.total}] {run}: starting")
        self._update()

    def step(self, run: Run, done: int, total: int) -> None:
        """Moves the bar of a run."""
        self.shares[run.key] = done / max(total, 1)
        self.states[run.key] = f"{run}: step {done}/{total}"
        self.progress.update(self.bars[run.key], completed=self.shares[run.key], note=f"step {done}/{total}")
        self._update()

    def tick(self) -> None:
        """Brings the time left up to date, and prints a line if there has been none for a while."""
        self._update()
        if not self.console.is_terminal and time.monotonic() - self._last_line >= LINE_EVERY:
            self._print(self._line())

    def ended(self, run: Run, record: dict[str, Any]) -> None:
        """Removes the bar of a run and prints how it ended."""
        del self.shares[run.key], self.states[run.key]
        self.progress.remove_task(self.bars.pop(run.key))
        self.done += 1
        self._update()
        text = f"[{self.done}/{self.total}] {run}: {record['status']} in {duration(record['seconds'])}"
        if record["status"] != "finished":
            text += f": {record['error']}"
        elif self.done < self.total:
            text += f", {self._left()}"
        self._print(text)

    def left(self) -> float | None:
        """Returns the seconds to go: from the pace so far and what was expected, or None while nothing is known."""
        worked = self.done - self.before + sum(self.shares.values())  # in runs
        to_go = self.total - self.before - worked
        elapsed = time.monotonic() - self.began
        if self.expected is not None:
            # what was expected counts as much as one run of every process
            return (elapsed + self.expected) / (worked + self.at_once) * to_go
        return elapsed / worked * to_go if worked else None

    def _left(self) -> str:
        left = self.left()
        return "time left unknown" if left is None else f"{duration(left)} left"

    def _note(self) -> str:
        starting = sum(state.endswith(": starting") for state in self.states.values())
        return f"{self.done}/{self.total} done, {f'{starting} starting, ' if starting else ''}{self._left()}"

    def _line(self) -> str:
        """Returns a line about all runs that go on, as many as fit."""
        line = f"{self._note()}; "
        states = list(self.states.values())
        shown: list[str] = []
        for index, state in enumerate(states):
            rest = f", {len(states) - index - 1} more" if index + 1 < len(states) else ""
            if shown and len(line + "; ".join([*shown, state]) + rest) > _WIDTH:
                return f"{line}{'; '.join(shown)}, {len(states) - index} more"
            shown.append(state)
        return line + "; ".join(shown)

    def _print(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.console.print(Text(text), soft_wrap=True)

    def _update(self) -> None:
        whole = self.done + sum(self.shares.values())
        self.progress.update(self.whole, completed=whole, note=self._note())
