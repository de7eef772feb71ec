"""Files that are either whole or absent, however a process ends."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file beside `path` and renames it, so that no reader meets half of it and several writers do not mix.

    The file has the permissions of an ordinary new file. A failed attempt leaves what was there before.

    Raises:
        OSError: The folder is missing or cannot be written, or the disk is full.
    """
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with unfinished.open("xb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    except BaseException:
        # the first error is the one to report, so one from the removal is dropped
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
