"""Cache folders: where they are, and work that fails."""

from __future__ import annotations

import errno
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


def test_where_things_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    assert cache.cache_folder() == tmp_path
    monkeypatch.delenv("TRL_EXT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache.cache_folder() == Path("/elsewhere/trl_ext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache" / "trl_ext"
