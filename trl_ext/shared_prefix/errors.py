"""Errors of the shared-prefix forward."""

from __future__ import annotations

from ..errors import TrlExtError


class SharedPrefixError(TrlExtError, RuntimeError):
    """The shared-prefix forward cannot run. The message gives the reason and a way out."""


class RefusedError(SharedPrefixError):
    """Sharing would not be exact for this model, batch or setting."""


class BatchError(RefusedError, ValueError):
    """These rows cannot be packed."""


class MismatchError(SharedPrefixError):
    """The first-use check found that the packed path differs from the dense path."""
