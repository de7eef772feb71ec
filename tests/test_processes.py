"""The limit of programs that tests start: what hangs ends, also what it has started, and says where it was."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests import processes

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(str(child.pid))
def waits_for_ever(): time.sleep(60)
waits_for_ever()
"""


def test_what_hangs_ends_with_what_it_has_started(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"took longer than 3 s[\s\S]*in waits_for_ever"):
        processes.run([sys.executable, "-c", HANGS, str(tmp_path / "child")], timeout=3)
    assert time.monotonic() - began < 30
    child = Path("/proc", (tmp_path / "child").read_text(), "stat")
    while child.exists() and child.read_text().split()[2] != "Z":  # it dies in a moment, and may wait to be reaped
        assert time.monotonic() - began < 30
        time.sleep(0.05)


def test_a_failure_shows_what_the_program_wrote() -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        processes.run_python("raise SystemExit('no such thing')", check=True)
