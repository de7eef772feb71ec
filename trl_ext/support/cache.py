"""Cache folders that are filled once and kept: converted and warmed-up models, generated data."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError

CACHE = "TRL_EXT_CACHE"
_NOT_WRITTEN = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EACCES", "EPERM", "EROFS", "EIO", "ENOTDIR", "EEXIST", "ENAMETOOLONG")
    if hasattr(errno, name)
}
"""Errors of the system that are about the place and not about the work."""


_UNFINISHED = ".unfinished"


def cache_folder() -> Path:
    """Returns the folder of all caches: `TRL_EXT_CACHE`, or `trl_ext` in the user's cache."""
    base = os.environ.get(CACHE)
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trl_ext"


def kept(target: Path, make: Callable[[Path], None], needed: int = 0) -> Path:
    """Returns a cache folder and fills it first if it is missing. Several processes may ask at once.

    `make` works in another folder, which is renamed to `target` when it is complete. An interrupted run therefore
    leaves nothing that looks finished, and what a killed one leaves is removed by the next that fills a folder.

    Args:
        target: A folder below `cache_folder()`.
        make: Fills the folder that it is given.
        needed: About how many bytes it writes. The free space is checked before the work begins.

    Raises:
        ConfigError: The folder cannot be written, or the disk is full.
    """
    from filelock import FileLock

    try:
        if target.is_dir():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():  # another process may have filled it while this one waited
                _fill(target, make, needed)
    except Exception as error:
        number = system_error(error)
        if number is None or number not in _NOT_WRITTEN:
            raise  # an error of the work itself, such as a model that cannot be read
        raise _unwritable(target.parent, os.strerror(number)) from error
    return target


def system_error(error: BaseException) -> int | None:
    """Returns the system's number of an error, which safetensors puts into its text."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error))
    return int(match[1] or match[2]) if match else None


def _remove_unfinished(target: Path) -> None:
    """Removes what killed processes left behind, of `target`, whose lock is held, and of the folders beside it."""
    from filelock import FileLock, Timeout

    for work in target.parent.glob(f"*{_UNFINISHED}"):
        name = work.name.rsplit(".", 2)[0]
        if name == target.name:
            shutil.rmtree(work, ignore_errors=True)
            continue
        # a living process holds the lock of its folder, and that of another user may be out of reach
        with contextlib.suppress(Timeout, OSError), FileLock(target.with_name(f"{name}.lock")).acquire(timeout=0):
            shutil.rmtree(work, ignore_errors=True)


def _fill(target: Path, make: Callable[[Path], None], needed: int) -> None:
    _remove_unfinished(target)
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < needed:
        reason = f"{needed / 2**20:.0f} MiB are needed and {free_bytes / 2**20:.0f} MiB are free"
        raise _unwritable(target.parent, reason)
    # a name of its own, as a child of a killed process may still write into the folder that it was given
    work = target.with_name(f"{target.name}.{secrets.token_hex(4)}{_UNFINISHED}")
    work.mkdir()
    try:
        make(work)
        # safetensors files are for their owner only, and other users may share the cache
        work.chmod(0o755)
        for file in work.iterdir():
            file.chmod(0o644)
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _unwritable(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"cannot write into the cache folder {folder}: {reason}. Free some space there, or choose another folder with "
        f"the environment variable {CACHE}."
    )
