"""Cache folders: where they are, and work that fails."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from trl_ext import ConfigError
from trl_ext.support import cache


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'),
    ],
)
def test_a_disk_that_fills_up(error: Exception, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise error

    with pytest.raises(ConfigError, match=r"cannot write into the cache folder .*: No space left on device\."):
        cache.kept(tmp_path / "deep" / "made", make)
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["made.lock"]


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), OSError("not a model"), SafetensorError("invalid header"), ValueError("x")):

        def make(folder: Path, error: BaseException = error) -> None:
            raise error

        with pytest.raises(type(error)):
            cache.kept(tmp_path / "made", make)
    assert not (tmp_path / "made").exists()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from trl_ext.support import cache

def make(folder):
    (folder / "half").write_text("half")
    print("started", flush=True)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)

cache.kept(Path(sys.argv[1]), make)
"""


def test_what_a_killed_process_leaves_is_removed_and_what_a_living_one_fills_is_not(tmp_path: Path) -> None:
    def run(name: str, end: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path / name), end]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    living = run("living", "lives")
    try:
        # one after the other, because a process that begins removes what a dead one has left
        assert living.stdout is not None and living.stdout.readline() == "started\n"
        dead = run("dead", "dies")
        assert dead.stdout is not None and dead.stdout.readline() == "started\n"
        dead.wait()
        assert [file.parent.name.partition(".")[0] for file in sorted(tmp_path.glob("*/half"))] == ["dead", "living"]

        def make(folder: Path) -> None:
            (folder / "whole").write_text("whole")

        cache.kept(tmp_path / "other", make)
        assert [file.parent.name.partition(".")[0] for file in tmp_path.glob("*/half")] == ["living"]
        assert [file.name for file in cache.kept(tmp_path / "dead", make).iterdir()] == ["whole"]
    finally:
        living.kill()
        for process in (dead, living):
            process.communicate()


def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "made.01234567.unfinished").mkdir()
    cache.kept(tmp_path / "made", lambda folder: None)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["made"]


def test_where_things_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("TRL_EXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache.cache_folder() == Path("/elsewhere/trl_ext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "trl_ext"
