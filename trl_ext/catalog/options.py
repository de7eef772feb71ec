"""Plugin options: from Python values, YAML or `--set` strings into the plugin's frozen dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import OptionError, near


def parse_set(assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["gdpo.group_eps=1e-4"]` -> `{"gdpo": {"group_eps": "1e-4"}}`; values are read as YAML."""
    parsed: dict[str, dict[str, Any]] = {}
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        plugin, dot, key = target.partition(".")
        if not (equals and dot and plugin and key):
            raise OptionError(f"--set {assignment}: expected PLUGIN.OPTION=VALUE, for example gdpo.group_eps=1e-4.")
        try:
            parsed.setdefault(plugin, {})[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise OptionError(f"--set {assignment}: the value is not valid YAML: {error}") from error
    return parsed


def build(options: type, values: Mapping[str, Any], plugin: str) -> Any:
    """Makes the options dataclass of a plugin.

    Raises:
        OptionError: For an unknown option (with the near names), a wrong type, a missing value, or a value that the
            dataclass itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(options) if field.init}
    unknown = [key for key in values if key not in fields]
    if unknown and not isinstance(unknown[0], str):
        raise OptionError(
            f"plugin {plugin!r}: an option is called {unknown[0]!r}, which is not a text. YAML reads on, off, yes and "
            f"no as true and false; put quotes around the name."
        )
    if unknown:
        raise OptionError(f"plugin {plugin!r} has no option {unknown[0]!r}.{near(unknown[0], fields)}")
    hints = typing.get_type_hints(options)
    typed = {}
    for key, value in values.items():
        try:
            typed[key] = coerce(value, hints[key])
        except (TypeError, ValueError, OptionError) as error:
            expected = describe(hints[key])
            raise OptionError(f"{plugin}.{key}: expected {expected}, got {value!r}. ({error})") from error
    missing = [name for name, field in fields.items() if name not in typed and required(field)]
    if missing:
        raise OptionError(
            f"plugin {plugin!r} needs a value for {missing[0]!r}: --set {plugin}.{missing[0]}=VALUE, "
            f"or `plugins: {{{plugin}: {{{missing[0]}: VALUE}}}}` in the YAML file."
        )
    try:
        return options(**typed)
    except (TypeError, ValueError) as error:
        raise OptionError(f"plugin {plugin!r}: {error}") from error


def required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def describe(hint: Any) -> str:
    """A type as a user would write it."""
    if get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in get_args(hint))
    if hint is type(None):
        return "null"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in get_args(hint))
    if get_origin(hint) in (list, tuple):
        return f"a list of {describe(get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return getattr(hint, "__name__", str(hint))


def coerce(value: Any, hint: Any) -> Any:
    """Converts a YAML or Python value to an annotated type, and refuses what would lose information."""
    origin, arms = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value in arms and type(value) in {type(arm) for arm in arms}:
            return value
        raise ValueError("not one of the choices")
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arms:
            return None
        reasons = []
        for arm in (arm for arm in arms if arm is not type(None)):
            try:
                return coerce(value, arm)
            except (TypeError, ValueError) as error:
                reasons.append(str(error))
        raise ValueError("; ".join(reasons))
    if origin in (list, tuple) or hint in (list, tuple):
        if not isinstance(value, list | tuple):
            raise TypeError("not a list")
        item = arms[0] if arms else Any
        return (list if (origin or hint) is list else tuple)(coerce(entry, item) for entry in value)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise TypeError("not a mapping")
        return dict(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise TypeError("not a mapping")
        return build(hint, value, hint.__name__)
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(hint, type):
        raise TypeError(f"options of type {hint} are not supported")
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise TypeError(f"is of type {type(value).__name__}")
