"""Where an error of somebody else's code came from, in one line."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

_LIBRARIES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), str(Path(__file__).parents[1])})
"""Folders of code that an author did not write: installed packages, Python, and the host."""


def where_it_failed(error: BaseException) -> str:
    """Returns an error with its hook and the last line of the author's code, or else the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    text = f"{type(error).__name__}: {error}"
    notes = "; ".join(getattr(error, "__notes__", ()))
    place = (own or frames)[-1] if frames else None
    line = f"at {place.filename}:{place.lineno}: {place.line}" if place else ""
    return "; ".join(part for part in (text, notes, line) if part)
