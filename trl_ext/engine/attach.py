"""Putting plugins in front of a trainer, and taking them off."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..plan.compose import Plan
from ..trl_internals.mixins import bases
from .host import PluginHost

_ORIGINAL = "_trl_ext_original"


def host_of(trainer: Any) -> PluginHost | None:
    """Returns the host of a trainer's plugins, or None."""
    host: PluginHost | None = getattr(trainer, "_trl_ext", None)
    return host


def has_plugins(cls: type[Any]) -> bool:
    """Tells whether a class is one that `put_in_front` made."""
    return hasattr(cls, _ORIGINAL)


def put_in_front(trainer: Any, plan: Plan) -> PluginHost:
    """Gives the trainer a class with our mixin in front of its own, and sets the plugins up."""
    cls = type(trainer)
    if host_of(trainer) is not None:
        raise ConfigError(
            f"this {cls.__name__} already has plugins. Name all of them in one call, after trl_ext.detach(trainer)."
        )
    host = PluginHost(trainer, plan)
    namespace = {_ORIGINAL: cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    trainer._trl_ext = host
    trainer.__class__ = type(cls.__name__, bases(plan.kind, cls), namespace)
    try:
        host.setup()
    except BaseException:
        take_off(trainer)
        raise
    return host


def take_off(trainer: Any) -> None:
    """Takes all plugins off a trainer and gives it its class back."""
    host = host_of(trainer)
    if host is None:
        raise ConfigError(f"this {type(trainer).__name__} has no plugins.")
    try:
        host.teardown()
    finally:
        trainer.__class__ = getattr(type(trainer), _ORIGINAL)
        del trainer._trl_ext
