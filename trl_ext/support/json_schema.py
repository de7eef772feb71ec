"""JSON Schema (draft 2020-12) of annotated Python types, as values of a YAML file."""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NUMBER = r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"
"""A number written as text: YAML 1.1 takes 1e-6 for one, and YAML 1.2, which editors read, for a number."""
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_PLAIN: dict[Any, dict[str, Any]] = {
    type(None): {"type": "null"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": ["number", "string"], "pattern": _NUMBER},
    str: {"type": "string"},
}
_ARRAYS = (list, tuple, set, frozenset, collections.abc.Sequence)
_OBJECTS = (dict, collections.abc.Mapping)


def of_type(hint: Any, bounds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the schema of a type. A type that cannot be described takes any value.

    Args:
        hint: The annotation.
        bounds: Bounds by the names that `trl_ext_hooks.option` gives them. They hold where they fit.
    """
    bounds = bounds or {}
    origin, arms = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any_of([of_type(arm, bounds) for arm in arms])
    if origin is Annotated:
        return of_type(arms[0], bounds)
    if origin is Literal:
        return {"enum": list(arms)}
    if hint in _PLAIN:
        return _PLAIN[hint] | _limits(hint, bounds)
    if (origin or hint) in _ARRAYS:
        items = {"items": of_type(arms[0])} if arms else {}
        return {"type": "array", **items, **_limits(list, bounds)}
    if (origin or hint) in _OBJECTS:
        return {"type": "object", **({"additionalProperties": of_type(arms[1])} if len(arms) == 2 else {})}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return of_dataclass(hint)
    return {}


def of_dataclass(cls: type) -> dict[str, Any]:
    """Returns the schema of a mapping with the fields of a dataclass, such as the options of a plugin."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [field for field in dataclasses.fields(cls) if field.init]
    properties = {}
    for field in fields:
        schema = of_type(hints[field.name], field.metadata.get("bounds"))
        properties[field.name] = described(schema, field.metadata.get("help", ""), _default(field))
    required = [field.name for field in fields if _default(field) is dataclasses.MISSING]
    return {
        "type": "object",
        "properties": properties,
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def described(schema: dict[str, Any], help: str, default: Any = dataclasses.MISSING) -> dict[str, Any]:
    """Returns a schema with its description and its default, where JSON can hold it."""
    value = plain(default)
    text = {"description": help} if help else {}
    return {**schema, **text, **({} if value is dataclasses.MISSING else {"default": value})}


def plain(value: Any) -> Any:
    """Returns a value as JSON and YAML hold it, `dataclasses.MISSING` where they cannot."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, list | tuple):
        entries = [plain(entry) for entry in value]
        return dataclasses.MISSING if dataclasses.MISSING in entries else entries
    if isinstance(value, Mapping):
        content = {str(key): plain(entry) for key, entry in value.items()}
        return dataclasses.MISSING if dataclasses.MISSING in content.values() else content
    fits = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if fits else dataclasses.MISSING


def any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the schema of what fits at least one schema. `null` joins the type or the choices of a single other."""
    flat = [arm for schema in schemas for arm in (schema["anyOf"] if set(schema) == {"anyOf"} else [schema])]
    distinct = [schema for index, schema in enumerate(flat) if schema not in flat[:index]]
    null = _PLAIN[type(None)]
    others = [schema for schema in distinct if schema != null]
    if {} in others:
        return {}
    if len(others) == 1 and null in distinct:
        (schema,) = others
        for key, value in (("enum", None), ("type", "null")):
            if key in schema:
                values = schema[key] if isinstance(schema[key], list) else [schema[key]]
                return schema | {key: [*values, *([] if value in values else [value])]}
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _limits(hint: Any, bounds: Mapping[str, Any]) -> dict[str, Any]:
    if hint in (int, float):
        return {_BOUNDS[name]: limit for name, limit in bounds.items() if name in _BOUNDS}
    length = bounds.get("min_length")
    name = {str: "minLength", list: "minItems"}.get(hint)
    return {} if length is None or name is None else {name: length}
