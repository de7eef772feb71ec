"""Folders that are made once and kept: converted and warmed-up models, generated data."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError

CACHE = "TRL_EXT_CACHE"
_NOT_WRITTEN = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO", "ENOTDIR", "EEXIST", "ENAMETOOLONG")
    if hasattr(errno, name)
}


def cache_folder() -> Path:
    """Where everything is kept: `TRL_EXT_CACHE`, or `trl_ext` in the user's cache."""
    base = os.environ.get(CACHE)
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_ext"


def kept(target: Path, make: Callable[[Path], None], needed: int = 0) -> Path:
    """`target`, a folder of the cache; where it is missing, `make` fills it first. Safe in several processes at once.

    `make` works in another folder, which takes the name `target` when everything is in it, so that a run that is
    interrupted leaves nothing that looks finished.

    Args:
        target: A folder below `cache_folder()`.
        make: Fills the folder that it is given.
        needed: Bytes that it writes, roughly; asked for before the work begins.

    Raises:
        ConfigError: The folder cannot be written, or the disk is full.
    """
    from filelock import FileLock

    try:
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():  # another process may have made it while this one waited
                _fill(target, make, needed)
    except Exception as error:
        number = system_error(error)
        if number is None or number not in _NOT_WRITTEN:  # of the work itself, such as a model that cannot be read
            raise
        raise _unwritable(target.parent, os.strerror(number)) from error
    return target


def system_error(error: BaseException) -> int | None:
    """The system's number of an error, also where safetensors has put it into a text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    return int(found[1] or found[2]) if found else None


def _fill(target: Path, make: Callable[[Path], None], needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise _unwritable(target.parent, f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")
    work = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=target.parent))
    try:
        make(work)
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)  # a cache may be shared
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _unwritable(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"cannot write into the cache folder {folder}: {reason}. Free some space there, or choose another folder with "
        f"the environment variable {CACHE}."
    )
