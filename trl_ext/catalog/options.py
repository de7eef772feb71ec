"""Plugin options: from Python values, YAML or `--set` strings into the plugin's frozen dataclass."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from ..errors import OptionError, PluginError, near
from .builtins import canonical

if TYPE_CHECKING:
    from pydantic import TypeAdapter

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
"""How bounds of `option` are printed."""


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
    hints = typing.get_type_hints(options, include_extras=True)
    typed = {}
    for key, value in values.items():
        bounds = fields[key].metadata.get("bounds", {})
        if _meant_null(value, hints[key]):
            raise OptionError(
                f"{plugin}.{key}: {value!r} is a text. For no value write null: --set {plugin}.{key}=null, or `{key}: "
                f"null` in YAML. In Python it is None, without quotes."
            )
        try:
            typed[key] = coerce(value, hints[key], bounds)
        except ValueError as error:
            expected = describe(hints[key]) + "".join(f", {text}" for text in limits(bounds))
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


def _meant_null(value: Any, hint: Any) -> bool:
    """Returns whether a value is Python's None as a text, for an option that takes null and has no choice `none`."""
    arms = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    choices = [choice for arm in arms if get_origin(arm) is Literal for choice in get_args(arm)]
    return value in ("None", "none") and type(None) in arms and value not in choices


def required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def describe(hint: Any) -> str:
    """Returns a type as a user would write it."""
    origin, arms = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arms)
    if hint is type(None):
        return "null"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(arm) for arm in arms)
    if origin is Annotated:
        need = _need(hint)
        return describe(arms[0]) if need is None else f"{need} name"
    if origin in (list, tuple):
        return f"a list of {describe(arms[0])}"
    if origin is dict:
        return f"a mapping of {describe(arms[0])} to {describe(arms[1])}"
    if dataclasses.is_dataclass(hint):
        return "a mapping with " + ", ".join(field.name for field in dataclasses.fields(hint))
    return getattr(hint, "__name__", str(hint))


def limits(bounds: Mapping[str, float]) -> list[str]:
    """Returns the bounds of an option in words, such as `> 0`."""
    return [
        f"{SIGNS[name]} {limit:g}" if name in SIGNS else f"at least {limit} long" if limit > 1 else "not empty"
        for name, limit in bounds.items()
    ]


def named_needs(options: Any, plugin: str) -> Iterator[tuple[str, str]]:
    """Yields the need and the full name of every option that names a reward or a column; None and "" name nothing."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        for need in _needs(getattr(options, field.name), hints[field.name]):
            if not need.startswith("plugin:"):
                yield need, f"{plugin}.{field.name}"


def named_plugins(options: Any, plugin: str) -> Iterator[tuple[str, str]]:
    """Yields the plugins that options name, each with the full name of the option."""
    hints = typing.get_type_hints(type(options), include_extras=True)
    for field in dataclasses.fields(options):
        for need in _needs(getattr(options, field.name), hints[field.name]):
            if need.startswith("plugin:"):
                yield need.removeprefix("plugin:"), f"{plugin}.{field.name}"


def _needs(value: Any, hint: Any) -> Iterator[str]:
    origin, arms = get_origin(hint), get_args(hint)
    kind = _need(hint)
    if kind is not None and isinstance(value, str) and value:
        yield f"{kind}:{value}"
    elif origin in (Union, types.UnionType):
        yield from dict.fromkeys(need for arm in arms for need in _needs(value, arm))
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        for entry in value:
            yield from _needs(entry, arms[0])
    elif origin is dict and isinstance(value, Mapping):
        for key, entry in value.items():
            yield from (*_needs(key, arms[0]), *_needs(entry, arms[1]))
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, hint):
        yield from (need for need, _ in named_needs(value, hint.__name__))


def _need(hint: Any) -> str | None:
    """Returns `reward`, `column` or `plugin` for the option types of these names."""
    marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    known = ("reward:NAME", "column:NAME", "plugin:NAME")
    return next((mark.partition(":")[0] for mark in marks if mark in known), None)


def coerce(value: Any, hint: Any, bounds: Mapping[str, Any] | None = None) -> Any:
    """Converts a YAML or Python value to an annotated type, and refuses what would lose information.

    Args:
        value: What the user gave.
        hint: The annotation of the option.
        bounds: Bounds of the option, by the names that `option` gives them.

    Raises:
        ValueError: The value does not fit. The text says why.
        PluginError: No value of this type can be checked.
    """
    from pydantic import ValidationError

    try:
        return _adapter(hint, tuple((bounds or {}).items())).validate_python(value)
    except ValidationError as error:
        lines = [line for line in error.errors(include_url=False) if line["type"] != "none_required"]
        reasons = dict.fromkeys(_reason(line) for line in lines)
        raise ValueError("; ".join(reasons)) from error


def _reason(line: Mapping[str, Any]) -> str:
    """Returns one complaint of pydantic, with the entry of a list that it is about."""
    text = line["msg"].removeprefix("Value error, ")
    place = [str(step) for step in line["loc"] if isinstance(step, int)]
    return f"entry {'.'.join(place)}: {text}" if place else text


@functools.cache
def _adapter(hint: Any, bounds: tuple[tuple[str, Any], ...]) -> TypeAdapter[Any]:
    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter

    try:
        return TypeAdapter(_checked(hint, dict(bounds)), config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except PydanticSchemaGenerationError as error:
        raise PluginError(f"options of type {describe(hint)} are not supported: {error}") from error


def _checked(hint: Any, bounds: Mapping[str, Any]) -> Any:
    """Returns the hint with its bounds, and with what lets pydantic's strict mode read YAML.

    YAML takes 1e-4 for a text and 3.0 for a float, and knows lists but no tuples.
    """
    from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

    origin, arms = get_origin(hint), get_args(hint)
    # a bound belongs to the arms of a union that it fits: `gt` to numbers, `min_length` to texts and lists
    fitting = {name: bound for name, bound in bounds.items() if fits(name, hint)}
    if origin in (Union, types.UnionType):
        checked = [_checked(arm, bounds) for arm in arms if arm is not type(None)]
        joined = checked[0]
        if len(checked) > 1:  # the first arm that takes the value wins, so that `float | str` reads 1e-4 as a number
            joined = Annotated[Union[tuple(checked)], Field(union_mode="left_to_right")]  # noqa: UP007
        return Union[joined, None] if type(None) in arms else joined  # noqa: UP007
    if origin is Annotated and _need(hint) == "plugin":
        return Annotated[_checked(arms[0], bounds), AfterValidator(canonical)]
    if origin is Annotated:
        return _checked(arms[0], bounds)
    if hint in (float, int):
        return Annotated[hint, Field(**fitting), BeforeValidator(_number if hint is float else _whole)]
    if hint is str:
        return Annotated[str, Field(**fitting)]
    if list in (origin, hint) or tuple in (origin, hint):
        kind = origin or hint
        entry = _checked(arms[0], {}) if arms else Any
        entries = types.GenericAlias(kind, (entry,) if kind is list else (entry, ...))
        return Annotated[entries, Field(**fitting), BeforeValidator(_sequence(kind))]
    if origin is dict:
        checked_arms = tuple(_checked(arm, {}) for arm in arms)
        return Annotated[types.GenericAlias(dict, checked_arms), BeforeValidator(_plain_dict)]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return Annotated[Any, PlainValidator(_mapping(hint))]
    return hint


def fits(bound: str, hint: Any) -> bool:
    """Whether a bound of `option` can be checked on a type, or on one arm of a union."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(bound, arm) for arm in get_args(hint))
    if origin is Annotated:
        return fits(bound, get_args(hint)[0])
    return hint in (float, int) if bound in SIGNS else hint is str or (origin or hint) in (list, tuple)


def _number(value: Any) -> Any:
    """Reads a text as a number, for YAML takes 1e-4 for a text, and makes numbers of numpy plain."""
    foreign = isinstance(value, numbers.Real) and not isinstance(value, bool | int)
    return float(value) if foreign or isinstance(value, str) else value


def _whole(value: Any) -> Any:
    foreign = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return int(value) if foreign or (isinstance(value, float) and value.is_integer()) else value


def _plain_dict(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _sequence(kind: type) -> Callable[[Any], Any]:
    return lambda value: kind(value) if isinstance(value, list | tuple) else value


def _mapping(cls: type) -> Callable[[Any], Any]:
    """Returns a reader of nested options: the dataclass itself, or a mapping with its fields. Both are checked."""

    def read(value: Any) -> Any:
        if isinstance(value, cls):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(cls) if field.init}
        if not isinstance(value, Mapping):
            raise ValueError("not a mapping")
        return build(cls, value, cls.__name__)

    return read
