"""Ctrl-C during a run: in the process of the user, which counts, and in the workers, which save or leave.

The first Ctrl-C reaches every worker, from the terminal and from the parent. A worker listens to the first signal only.
The second Ctrl-C is the parent's alone: it ends all workers at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets a function handle SIGINT during the block.

    A process that was started with SIGINT ignored, as in the background of a shell script, goes on ignoring it.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Parent:
    """Ctrl-C in the process that starts the workers.

    Args:
        say: Called with a line for the user.
        first: What happens at the first Ctrl-C, in words.

    Attributes:
        count: How often it was pressed.
    """

    def __init__(self, say: Callable[[str], None], first: str) -> None:
        self.count = 0
        self._say = say
        self._first = first

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Counts during the block, and raises nothing while workers run."""
        return handled(self._pressed)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        import psutil

        self.count += 1
        children = psutil.Process().children(recursive=self.count > 1)
        if not children or self.count > 2:
            raise KeyboardInterrupt
        if self.count == 1:
            self._say(f"{self._first}; Ctrl-C again leaves at once")
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended meanwhile
                child.send_signal(signal.SIGINT if self.count == 1 else signal.SIGKILL)


class Worker:
    """Ctrl-C in a worker process.

    Attributes:
        told: Whether it came.
        waits: Whether it waits for the end of a round. Otherwise it raises KeyboardInterrupt where it comes.
    """

    def __init__(self) -> None:
        self.told = False
        self.waits = False

    def listening(self) -> contextlib.AbstractContextManager[None]:
        """Listens during the block."""
        return handled(self._pressed)

    def _pressed(self, number: int, frame: FrameType | None) -> None:
        if self.told:
            return
        self.told = True
        if not self.waits:
            raise KeyboardInterrupt

    def agreed(self, accelerator: Any) -> bool:
        """Returns whether any process was told. Collective."""
        import torch

        told = torch.tensor([float(self.told)], device=accelerator.device)
        return bool(accelerator.gather(told).max() > 0)
