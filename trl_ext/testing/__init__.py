"""Tools for testing plugins: a tiny model, data, real trainers that take seconds on a CPU, and conformance checks.

from trl_ext.testing import conformance, tiny_model, tiny_trainer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tiny import (
    Scripted,
    brevity,
    calls,
    digits,
    metrics_of,
    reported,
    tiny_args,
    tiny_data,
    tiny_model,
    tiny_trainer,
)

if TYPE_CHECKING:
    from .checks import conformance

__all__ = [
    "Scripted",
    "brevity",
    "calls",
    "conformance",
    "digits",
    "metrics_of",
    "reported",
    "tiny_args",
    "tiny_data",
    "tiny_model",
    "tiny_trainer",
]


def __getattr__(name: str) -> Any:
    if name == "conformance":  # imported on demand: it imports the whole host, which most tests do not need
        from .checks import conformance

        return conformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
