"""An end for test runs that hang: which tests were running, where each of their threads was, and a failure.

It lives in the process that collects the results, so that it works whatever has happened to a worker: a thread that
holds the interpreter, a process that is stopped, one that is gone while its pipe is open.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from typing import TextIO

import psutil
import pytest

LIMIT = 1500.0
"""Seconds without a result after which a run has hung. No program that a test starts may take as long."""
_LAST_WORDS = 5.0
"""Seconds in which the processes write where they are."""


class Watchdog:
    """Ends the run when no test has begun or ended for `limit` seconds."""

    def __init__(self, limit: float = LIMIT, stream: TextIO | None = None) -> None:
        self.limit = limit
        # what pytest captures is lost with the process, so it is written past the capture
        self._stream = stream or os.fdopen(os.dup(2), "w")
        self._running: list[str] = []
        self._last_sign = time.monotonic()
        self._ended = threading.Event()

    def start(self) -> None:
        """Begins to watch, in a thread that ends with the process."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._last_sign = time.monotonic()
        self._running.append(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._last_sign = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._last_sign = time.monotonic()
        if nodeid in self._running:
            self._running.remove(nodeid)

    def pytest_unconfigure(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(min(self.limit / 10, 1.0)):
            if time.monotonic() - self._last_sign > self.limit:
                self._end()

    def _end(self) -> None:
        lines = [f"\nNo test has begun or ended for {self.limit:g} s. Running:", *self._running, "Processes:"]
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        for process in processes:
            lines.append(_describe(process))
        self._stream.write("\n".join(lines) + "\n")
        self._stream.flush()
        faulthandler.dump_traceback(self._stream)
        for process in reversed(processes[1:]):  # pytest's fault handler answers with the stack of each thread
            _send(process, signal.SIGABRT)
            _send(process, signal.SIGCONT)
        time.sleep(_LAST_WORDS)
        for process in psutil.Process().children(recursive=True):
            _send(process, signal.SIGKILL)
        os._exit(pytest.ExitCode.INTERNAL_ERROR)


def install(config: pytest.Config) -> None:
    """Watches a run, once: in the process that collects the results, not in its workers."""
    if not hasattr(config, "workerinput"):
        watchdog = Watchdog()
        config.pluginmanager.register(watchdog, "watchdog")
        watchdog.start()


def _describe(process: psutil.Process) -> str:
    """Returns a line with the state of a process and the place in the kernel where it waits."""
    try:
        place = Path("/proc", str(process.pid), "wchan")
        state = f"{process.status()} {place.read_text() if place.exists() else ''}"
        return f"  {process.pid} of {process.ppid()}: {state}: {' '.join(process.cmdline())[:120]}"
    except (psutil.Error, OSError) as error:
        return f"  {process.pid}: {error}"


def _send(process: psutil.Process, sign: signal.Signals) -> None:
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:
        return  # it has ended in the meantime
