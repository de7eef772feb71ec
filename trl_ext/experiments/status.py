"""What a person sees while runs go on: how many are done, what runs now, and how long it will take."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from ..support.tables import duration
from .records import Job


class Status:
    """Bars in a terminal, a line per finished run elsewhere.

    Args:
        total: Number of runs of the comparison.
        done: Runs that were there before.
        console: Where to write.
    """

    def __init__(self, total: int, done: int, console: Console) -> None:
        self.total, self.before, self.done = total, done, done
        self.console = console
        self.began = time.monotonic()
        self.parts: dict[str, float] = {}
        self.bars: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.whole = self.progress.add_task("all runs", total=total, completed=done, note="")

    def __enter__(self) -> Status:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def started(self, job: Job) -> None:
        self.parts[job.key] = 0.0
        self.bars[job.key] = self.progress.add_task(f"  {job}", total=1.0, note="starting")

    def step(self, job: Job, done: int, total: int) -> None:
        self.parts[job.key] = done / max(total, 1)
        self.progress.update(self.bars[job.key], completed=self.parts[job.key], note=f"step {done}/{total}")
        self._update()

    def ended(self, job: Job, record: dict[str, Any]) -> None:
        del self.parts[job.key]
        self.progress.remove_task(self.bars.pop(job.key))
        self.done += 1
        self._update()
        text = f"[{self.done}/{self.total}] {job}: {record['status']} in {duration(record['seconds'])}"
        if record["status"] != "finished":
            text += f": {record['error']}"
        elif self.done < self.total:
            text += f", {duration(self.left())} left"
        self.console.print(Text(text), soft_wrap=True)

    def left(self) -> float:
        """Seconds to go, from the pace so far."""
        worked = self.done - self.before + sum(self.parts.values())
        to_go = self.total - self.before - worked
        return (time.monotonic() - self.began) / worked * to_go if worked else 0.0

    def _update(self) -> None:
        whole = self.done + sum(self.parts.values())
        note = f"{self.done}/{self.total} done, {duration(self.left())} left"
        self.progress.update(self.whole, completed=whole, note=note)
