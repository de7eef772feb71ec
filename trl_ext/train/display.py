"""What a run does at the moment: a bar at the foot of a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..support.console import run_bar
from ..support.tables import duration
from .command_line import say

if TYPE_CHECKING:
    from rich.progress import Progress


class Display:
    """Shows the present part of a run on standard error.

    Args:
        bar: Whether to draw a bar. Otherwise each part is a line, for pipes and files.
    """

    def __init__(self, bar: bool) -> None:
        self._bar: Progress | None = None
        if bar:
            self._bar = run_bar()
            self._task = self._bar.add_task("", total=None, note="")
            self._bar.start()

    def part(self, text: str) -> None:
        """Says what begins now."""
        if self._bar is None:
            say(text)
        else:
            self._bar.update(self._task, description=text)

    def detail(self, text: str) -> None:
        """Says it where there is a bar, for what comes too often for lines of its own."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)

    def time(self, spent: float, left: float, sure: bool) -> None:
        """Moves the bar.

        Args:
            spent: The seconds since training began.
            left: An estimate of the seconds that are left.
            sure: Whether the estimate counts everything that lies ahead.
        """
        if self._bar is not None:
            self._bar.update(self._task, total=spent + left, completed=spent, note=left_text(left, sure))

    def close(self) -> None:
        """Removes the bar. Calling it again does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def left_text(seconds: float, sure: bool) -> str:
    """Writes the time that is left: `left 1:20`, or `left >1:20` where it does not count everything."""
    return f"left {'' if sure else '>'}{duration(seconds)}"


def no_library_bars() -> None:
    """Switches off the bars of libraries, which fill a file with half lines and come once per process."""
    import datasets
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
