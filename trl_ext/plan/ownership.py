"""Ownership of a run: a plugin with the hook `run` trains several times and cannot be given to a single trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ..catalog.declaration import PluginSpec
from ..errors import ConfigError

_runs_under_way = 0


def owner(specs: Sequence[PluginSpec]) -> PluginSpec | None:
    """Returns the plugin that owns the run, if one does."""
    return next((spec for spec in specs if "run" in spec.hooks), None)


@contextlib.contextmanager
def run_under_way() -> Iterator[None]:
    """Lets trainers that are built during the block have a plugin that owns the run."""
    global _runs_under_way
    _runs_under_way += 1
    try:
        yield
    finally:
        _runs_under_way -= 1


def check_owned(specs: Sequence[PluginSpec]) -> None:
    """Refuses a trainer outside the run that one of its plugins must own.

    Raises:
        ConfigError: With the ways to start such a run.
    """
    spec = owner(specs)
    if spec is not None and not _runs_under_way:
        raise ConfigError(
            f"plugin {spec.name!r} trains several times and owns the whole run, so it cannot be given to one trainer. "
            f"Start the run with `trl_ext train --plugin {spec.name} --trainer dpo ...`, or in Python with "
            f"trl_ext.run({spec.name!r}, model=..., args=..., train_dataset=...)."
        )
