"""The errors of the shared-prefix forward."""

from __future__ import annotations

from ..errors import TrlExtError


class SharedPrefixError(TrlExtError, RuntimeError):
    """The shared-prefix forward cannot run. The text names the reason and the way out."""


class RefusedError(SharedPrefixError):
    """The model, the batch or the setting has a feature with which sharing would not be exact."""


class MismatchError(SharedPrefixError):
    """The first-use check found that the packed path differs from the dense path."""
