"""The progress of a comparison for people: how many runs are done, what runs now, and how long it will take."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..support.console import bars
from ..support.tables import duration
from .runs import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


class ProgressDisplay:
    """Shows bars in a terminal and a line for each finished run elsewhere.

    Args:
        total: Number of runs of the comparison.
        done: Runs that were there before.
        console: Where to write.
    """

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.total, self.before, self.done = total, done, done
        self.console = console
        self.began = time.monotonic()
        self.shares: dict[str, float] = {}
        self.bars: dict[str, TaskID] = {}
        self.progress = bars(console)
        self.whole = self.progress.add_task("all runs", total=total, completed=done, note="")

    def __enter__(self) -> ProgressDisplay:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def started(self, run: Run) -> None:
        """Adds a bar for a run."""
        self.shares[run.key] = 0.0
        self.bars[run.key] = self.progress.add_task(f"  {run}", total=1.0, note="starting")

    def step(self, run: Run, done: int, total: int) -> None:
        """Moves the bar of a run."""
        self.shares[run.key] = done / max(total, 1)
        self.progress.update(self.bars[run.key], completed=self.shares[run.key], note=f"step {done}/{total}")
        self._update()

    def ended(self, run: Run, record: dict[str, Any]) -> None:
        """Removes the bar of a run and prints how it ended."""
        del self.shares[run.key]
        self.progress.remove_task(self.bars.pop(run.key))
        self.done += 1
        self._update()
        text = f"[{self.done}/{self.total}] {run}: {record['status']} in {duration(record['seconds'])}"
        if record["status"] != "finished":
            text += f": {record['error']}"
        elif self.done < self.total:
            text += f", {duration(self.left())} left"
        self.console.print(Text(text), soft_wrap=True)

    def left(self) -> float:
        """Returns the seconds to go, from the pace so far."""
        worked = self.done - self.before + sum(self.shares.values())
        to_go = self.total - self.before - worked
        return (time.monotonic() - self.began) / worked * to_go if worked else 0.0

    def _update(self) -> None:
        whole = self.done + sum(self.shares.values())
        note = f"{self.done}/{self.total} done, {duration(self.left())} left"
        self.progress.update(self.whole, completed=whole, note=note)
