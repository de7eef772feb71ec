"""A plugin system for Hugging Face TRL's trainers: one published method, one plugin.

    import trl_ext
    trl_ext.enable("gdpo")          # every GRPOTrainer built from now on

Nothing heavy is imported until a plugin is switched on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import CompatError, ConfigError, OptionError, PluginError, TrlExtError, UnknownPluginError

if TYPE_CHECKING:
    from .api import Handle, attach, detach, disable, enable, extend, record
    from .campaign.job import run

_LAZY = ("Handle", "attach", "detach", "disable", "enable", "extend", "record", "run")

__all__ = [
    "CompatError",
    "ConfigError",
    "Handle",
    "OptionError",
    "PluginError",
    "TrlExtError",
    "UnknownPluginError",
    "__version__",
    "attach",
    "detach",
    "disable",
    "enable",
    "extend",
    "record",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import api
        from .campaign import job

        return getattr(job if name == "run" else api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
