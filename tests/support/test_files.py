"""`write_atomically`: whole files, ordinary permissions, and nothing left behind by a failure."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from trl_ext.support import files
from trl_ext.support.files import write_atomically


def test_writes_text_as_utf8_and_bytes_as_they_are(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "größer\n")
    write_atomically(tmp_path / "bytes", b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == b"gr\xc3\xb6\xc3\x9fer\n"
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bytes", "text"]


def test_replaces_what_was_there(tmp_path: Path) -> None:
    for content in ("old", "new and longer", ""):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_text() == content


def test_everybody_may_read_the_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_the_file_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def replace(source: Path, target: Path) -> None:
        seen.append((source.parent, source.name.startswith("file."), source.read_text(), target.exists()))
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(files.os, "replace", replace)
    write_atomically(tmp_path / "file", "whole")
    assert seen == [(tmp_path, True, "whole", False)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_a_failure_keeps_the_old_file_and_removes_the_part(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: Path, target: Path) -> None:
        raise error

    write_atomically(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "nowhere" / "file", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file" / "below", "x")


def test_several_writers_do_not_mix(tmp_path: Path) -> None:
    contents = [letter * 200_000 for letter in "abcd"]
    writers = [
        threading.Thread(target=lambda text=text: [write_atomically(tmp_path / "file", text) for _ in range(10)])  # type: ignore[misc]
        for text in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "file").read_text() in contents and list(tmp_path.iterdir()) == [tmp_path / "file"]
