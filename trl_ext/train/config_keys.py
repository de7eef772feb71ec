"""Keys of the YAML file: unknown ones and wrong values are told as keys of that file, not as options."""

from __future__ import annotations

import argparse
import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from trl_ext_hooks import TrainerKind

from ..catalog import options
from ..catalog.declaration import PluginSpec
from ..errors import ConfigError, near
from ..trl_internals import launch as trl_launch
from ..trl_internals.arguments import Setting, trl_parser

LISTS = ("reward_funcs",)
"""Lists that TRL would read letter by letter from a text. It takes a text for a list of one elsewhere."""

_CHECKED = (bool, int, float, type(None), list[int], list[float])
"""Types whose values are checked here. Texts are checked by TRL's parser and by the libraries."""


def check(
    file: str, kind: TrainerKind, settings: Mapping[str, Any], own: Sequence[str], specs: Sequence[PluginSpec]
) -> None:
    """Checks the keys and values of a YAML file, without our own blocks.

    Args:
        file: The file, to be named in errors.
        kind: The trainer.
        settings: What the file holds for TRL and accelerate.
        own: Keys that are ours.
        specs: The plugins of the run.

    Raises:
        ConfigError: A key does not exist, or has a value of a wrong type.
    """
    of_trl = trl_parser(kind).settings()
    of_launcher = trl_launch.options()
    for key, value in settings.items():
        if key in of_trl:
            problem = _problem(key, value, of_trl[key])
            if problem is not None:
                raise ConfigError(f"{file}: {key}: {problem}")
        elif key not in of_launcher:
            raise ConfigError(f"{file}: there is no key {key!r}.{_hint(key, [*of_trl, *of_launcher, *own], specs)}")


def _hint(key: str, known: Sequence[str], specs: Sequence[PluginSpec]) -> str:
    """Says where a key belongs, or which known ones are near."""
    for spec in specs:
        if key in (spec.name, spec.reference):
            return f" It is a plugin: put it under `plugins:`, as in `plugins: {{{spec.reference}: {{}}}}`."
        if key in {field.name for field in dataclasses.fields(spec.options)}:
            return f" It is an option of the plugin {spec.name}: `plugins: {{{spec.reference}: {{{key}: VALUE}}}}`."
    hint = near(key, known).partition(" Known:")[0].removesuffix(".")
    return f"{hint} `trl_ext schema` prints all keys, for an editor that checks the file."


def _problem(key: str, value: Any, setting: Setting) -> str | None:
    """Returns what is wrong with a value, None if nothing is."""
    if value is setting.default:
        return None
    if value is False and "no" in (setting.choices or ()):
        return f'YAML reads a bare no as false. Put quotes around it: {key}: "no"'
    (entry,) = [arm for arm in arms_of(setting.hint) if get_origin(arm) is list][:1] or [None]
    if entry is not None and dataclasses.is_dataclass(get_args(entry)[0]):
        return _entries_problem(value, [field.name for field in dataclasses.fields(get_args(entry)[0])])
    if isinstance(value, str):
        return _text_problem(key, value, setting)
    # TRL and transformers take more for a text than they annotate, such as `fsdp: true`, so only numbers are checked
    if not all(arm in _CHECKED for arm in arms_of(setting.hint)):
        return None
    try:
        options.coerce(value, setting.hint)
    except ValueError:
        return f"expected {options.describe(setting.hint)}, got {value!r}."
    return None


def arms_of(hint: Any) -> tuple[Any, ...]:
    """Returns the types that a type allows."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _entries_problem(value: Any, fields: Sequence[str]) -> str | None:
    """Returns what is wrong with a list of mappings, such as `datasets:`."""
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        return f"expected a list of mappings, got {value!r}."
    for index, entry in enumerate(value):
        for name in entry:
            if name not in fields:
                return f"entry {index + 1}: there is no key {name!r}.{near(str(name), fields)}"
    return None


def _text_problem(key: str, value: str, setting: Setting) -> str | None:
    """Returns what is wrong with a text, which TRL's parser reads as on a command line."""
    if key in LISTS:
        return f"expected a list, got {value!r}. Write [{value}]."
    try:
        read = setting.read(value)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return f"expected {options.describe(setting.hint)}, got {value!r}."
    if setting.choices is not None and read not in setting.choices:
        return f"{value!r} is none of the choices.{near(value, map(str, setting.choices))}"
    return None
