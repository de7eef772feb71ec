"""The end of test runs that hang: it comes whatever the worker does, and names the test and the place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import processes

CONFTEST = """
from tests.watchdog import Watchdog

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        watchdog = Watchdog(limit=2)
        config.pluginmanager.register(watchdog)
        watchdog.start()
"""
SLEEPS = "import time; time.sleep(100)"
HOLDS_THE_INTERPRETER = "import ctypes; ctypes.PyDLL(None).sleep(100)"
IS_STOPPED = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
IS_GONE = "import os, time; os.fork() or os.kill(os.getppid(), 9); time.sleep(8); os._exit(0)"
"""The fork keeps the pipe of its worker open, so that nobody sees that the worker is gone."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hang", "workers", "place"),
    [
        (SLEEPS, "0", "in test_that_hangs"),
        (SLEEPS, "1", "in test_that_hangs"),
        (HOLDS_THE_INTERPRETER, "1", "in test_that_hangs"),
        (IS_STOPPED, "1", ": stopped "),
        (IS_GONE, "1", ""),
    ],
    ids=["sleeps, alone", "sleeps", "holds the interpreter", "is stopped", "is gone"],
)
def test_a_run_that_hangs_ends_and_says_where(hang: str, workers: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(f"def test_first(): pass\ndef test_that_hangs(): {hang}\n")
    run = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-n", workers, str(tmp_path)]
    ended = processes.run(run, timeout=60)
    assert ended.returncode, ended.stdout
    assert "No test has begun or ended for 2 s. Running:\ntest_it.py::test_that_hangs" in ended.stderr
    assert place in ended.stderr
