"""Versions of the packages that can change what a run computes."""

from __future__ import annotations

import importlib.metadata
import platform

from .._version import __version__

_PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft", "datasets")


def versions() -> dict[str, str | None]:
    """Versions of trl_ext, Python and the packages that can change what a run computes."""
    found: dict[str, str | None] = {"trl_ext": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
