"""Handover of a request from the parent process to its workers, in a file.

The workers take over the options that the parent has built, so nothing is read or checked twice. A plugin class
stands in the file as the reference by which the user asked for it. Only the finder can load a class from a file.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from trl_ext_hooks import Plugin

from ..catalog import find
from .command_line import Request

FILE = "request.pickle"


class _Writer(pickle.Pickler):
    """Writes plugin classes as references."""

    def __init__(self, file: Any, references: dict[type[Plugin], str]) -> None:
        super().__init__(file)
        self._references = references

    def persistent_id(self, value: Any) -> str | None:
        return self._references.get(value) if isinstance(value, type) else None


class _Reader(pickle.Unpickler):
    """Loads plugin classes by reference. A spec holds its class first, so the module of its options is loaded."""

    def persistent_load(self, reference: Any) -> type[Plugin]:
        return find.find(reference)[0]


def write(request: Request, folder: Path) -> Path:
    """Writes a request into a folder that only the user can read, and returns the file."""
    file = folder / FILE
    with file.open("wb") as stream:
        _Writer(stream, {spec.cls: spec.reference for spec in request.specs}).dump(request)
    return file


def read(file: Path) -> Request:
    """Reads the request that the parent process wrote."""
    with file.open("rb") as stream:
        request = _Reader(stream).load()
    assert isinstance(request, Request)
    return request
