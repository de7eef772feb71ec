"""Trainers that are built without the plugins that are enabled, noticed at the constructor that all trainers share."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ConfigError
from . import seams


class Watch:
    """Notices every trainer that is built past the constructors which give plugins.

    Attributes:
        plugins: The plugins, in words.
        served: Whether a trainer took them.
    """

    def __init__(self, plugins: str) -> None:
        self.plugins = plugins
        self.served = False
        self._classes: tuple[type[Any], ...] = ()
        self._building: list[Any] = []
        self._named: set[type] = set()
        self._active = False

    @contextlib.contextmanager
    def serving(self, trainer: Any) -> Iterator[None]:
        """Marks the constructor of a trainer that takes the plugins."""
        self._building.append(trainer)
        try:
            yield
        finally:
            self._building.pop()
        self.served = True

    def begin(self, classes: Sequence[type[Any]]) -> None:
        """Wraps the constructor of transformers' trainer, which those of all TRL trainers call.

        Args:
            classes: The classes whose constructors give plugins.
        """
        import transformers

        owner: Any = transformers.Trainer
        original = owner.__init__
        watch = self

        @functools.wraps(original)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            if watch._active and not any(self is trainer for trainer in watch._building):
                watch._passed_by(type(self))
            original(self, *args, **kwargs)

        owner.__init__ = __init__
        self._active, self._classes = True, tuple(classes)
        self._undo = (owner, __init__, original)

    def end(self) -> None:
        """Undoes `begin`. A wrap that another library has put around ours stays, and ours then does nothing."""
        owner, wrapped, original = self._undo
        self._active = False
        if owner.__init__ is wrapped:
            owner.__init__ = original

    def _passed_by(self, cls: type[Any]) -> None:
        """Says that a trainer of this class gets no plugins.

        Raises:
            ConfigError: The class stands where users expect one that gets them.
        """
        where = f"{cls.__module__}.{cls.__qualname__}"
        base = next((base for base in self._classes if issubclass(cls, base)), None)
        if base is not None:
            raise ConfigError(
                f"{where} does not call {base.__name__}.__init__, so it would train without {self.plugins}. Call it "
                f"from the constructor of the subclass."
            )
        if seams.stands_for(cls) is not None:
            raise ConfigError(
                f"{where} is not the class that trl_ext.enable gave {self.plugins}: another library, or a reload, has "
                f"put another class in its place. Import that library first, then call trl_ext.enable, and take the "
                f"trainer from trl after that."
            )
        if cls in self._named:
            return
        self._named.add(cls)
        warnings.warn(
            f"trl_ext: {where} takes no plugins, so it trains without {self.plugins}. Plugins act on GRPOTrainer, "
            f"RLOOTrainer, DPOTrainer and their subclasses.",
            stacklevel=4,
        )
