"""Imports of what a user names as a file or as a module."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import linecache
import sys
from pathlib import Path
from types import ModuleType

from ..errors import TrlExtError


def is_file(reference: str) -> bool:
    """Returns whether a reference is `file.py` or `file.py:attribute`."""
    return reference.endswith(".py") or ".py:" in reference


def split_file(reference: str) -> tuple[Path, str]:
    """Splits `folder/file.py:attribute` into the file and the attribute, which may be empty."""
    path, _, attribute = reference.partition(".py:")
    return Path(path if not attribute else path + ".py"), attribute


def import_module(module: str, purpose: str, error: type[TrlExtError]) -> ModuleType:
    """Imports a module.

    Args:
        module: Its dotted name.
        purpose: What it is wanted for, which begins the error.
        error: The class of the error.
    """
    try:
        return importlib.import_module(module)
    except Exception as cause:  # a stranger's module may raise anything
        raise error(f"{purpose}: importing {module!r} failed: {type(cause).__name__}: {cause}") from cause


_loaded: dict[str, bytes] = {}
"""What the files held when they were loaded, by the names of their modules."""


def load_file(file: Path, purpose: str, error: type[TrlExtError]) -> ModuleType:
    """Loads a file as a module, and again when it was edited.

    Args:
        file: The Python file.
        purpose: What it is wanted for, which begins the error.
        error: The class of the error.
    """
    digest = hashlib.sha1(str(file.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"trl_ext_file_{file.stem}_{digest}", file)
    assert spec is not None and spec.loader is not None
    content = file.read_bytes()
    earlier = sys.modules.get(spec.name)
    if earlier is not None and _loaded.get(spec.name) == content:
        return earlier
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their class
    linecache.checkcache(str(file))
    try:
        # not through the loader, whose cache of bytecode does not notice two edits within a second
        exec(compile(content, str(file), "exec"), module.__dict__)
    except BaseException as cause:
        if earlier is None:
            del sys.modules[spec.name]
        else:
            sys.modules[spec.name] = earlier  # objects that came from it are still in use
        if not isinstance(cause, Exception):
            raise
        raise error(f"{purpose} file {str(file)!r} failed: {type(cause).__name__}: {cause}") from cause
    _loaded[spec.name] = content
    return module
