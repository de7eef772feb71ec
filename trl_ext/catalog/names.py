"""Names that people type where a plugin is expected, and what to type instead."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from trl_ext_hooks import TrainerKind

from ..errors import UnknownPluginError, near
from ..trl_internals.loss_types import loss_types
from .builtins import canonical

KINDS: tuple[TrainerKind, ...] = get_args(TrainerKind)
_SETTINGS = {"gspo": "--importance_sampling_level sequence --loss_type grpo"}
"""Methods of TRL's GRPO trainer that have a name of their own and are a setting, as TRL documents them."""


def is_place(reference: str) -> bool:
    """Returns whether a reference is a file or `module:attribute`, and no name."""
    return ":" in reference or reference.endswith(".py")


def check_single(reference: str) -> None:
    """Refuses several names in one text, such as `gdpo,otc`.

    Raises:
        UnknownPluginError: Says how to name them apart.
    """
    names = [name for name in re.split(r"[\s,;+]+", reference) if name]
    if is_place(reference) or not names or names == [reference]:
        return
    raise UnknownPluginError(
        f"{reference!r} is not the name of one plugin. Names are separate words, without commas: --plugin "
        f"{' '.join(names)} on the command line, trl_ext.enable({', '.join(map(repr, names))}) in Python, and in YAML "
        f"`plugins: {{{', '.join(f'{name}: {{}}' for name in names)}}}`."
    )


def unknown(reference: str, known: Iterable[str]) -> UnknownPluginError:
    """Returns the error for a name that no plugin has, with what the user may have meant.

    Args:
        reference: What was typed.
        known: The names of all plugins.
    """
    name = canonical(reference)
    start = f"no plugin is called {reference!r}."
    if name in KINDS:
        return UnknownPluginError(
            f"{start} It is a trainer of TRL: `trl_ext train --trainer {name}`, or `trl.{name.upper()}Trainer` in "
            f"Python."
        )
    if name in _SETTINGS:
        return UnknownPluginError(
            f"{start} TRL has it as settings of its GRPO trainer: `trl_ext train --trainer grpo {_SETTINGS[name]}`."
        )
    loss_type = name.replace("-", "_")
    for kind in KINDS:
        if loss_type in loss_types(kind):
            return UnknownPluginError(
                f"{start} It is a loss of TRL's own {kind.upper()} trainer: `trl_ext train --trainer {kind} "
                f"--loss_type {loss_type}`, or `{kind.upper()}Config(loss_type={loss_type!r})` in Python."
            )
    return UnknownPluginError(f"{start}{near(name, known)}")


def option_for(word: str, known: Iterable[str]) -> str | None:
    """Returns the option of `trl_ext train` that a word such as `gdpo` belongs to. None if it fits none."""
    if word.endswith((".yaml", ".yml")):
        return "--config"
    if canonical(word) in KINDS:
        return "--trainer"
    return "--plugin" if is_place(word) or canonical(word) in known else None
