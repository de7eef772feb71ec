"""Errors that trl_ext raises, all derived from `TrlExtError`, and what their texts share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrlExtError(Exception):
    """Base of all errors of trl_ext. The text says what came, what was expected and what to do."""


class UnknownPluginError(TrlExtError, LookupError):
    """No plugin has the name that was asked for."""


class PluginError(TrlExtError):
    """A plugin is broken: it cannot be loaded, breaks the contract, or fails while it runs."""


class OptionError(TrlExtError, ValueError):
    """An option does not exist or has a wrong value."""


class ConfigError(TrlExtError, ValueError):
    """Plugins, settings and trainer do not fit together."""


class CompatError(TrlExtError, RuntimeError):
    """The installed TRL cannot be extended, or a part of it was replaced."""


def near(name: str, known: Iterable[str]) -> str:
    """Returns a sentence with the names nearest to a misspelt one, and all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{hint} Known: {', '.join(names) if names else 'none'}."


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Writes a count with its noun: `1 step`, `2 steps`.

    Args:
        count: The count.
        noun: The noun for one.
        plural: The noun for several, by default with `s`, or `es` where that is spelt.
    """
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count} {noun if count == 1 else plural or noun + ending}"
