"""Versions of the packages that can change what a run computes."""

from __future__ import annotations

import importlib.metadata
import platform

from .._version import __version__

_PACKAGES = ("trl", "transformers", "torch", "accelerate", "peft", "datasets")


def installed_version(package: str) -> str | None:
    """Returns the version of an installed package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Returns the versions of trl_ext, Python and the packages that can change what a run computes."""
    ours: dict[str, str | None] = {"trl_ext": __version__, "python": platform.python_version()}
    return ours | {package: installed_version(package) for package in _PACKAGES}
