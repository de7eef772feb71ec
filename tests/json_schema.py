"""A validator of JSON Schema for what our schemas use. The test suite needs no package for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

TYPES: dict[str, Any] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": dict,
}
KNOWN = {"$ref", "type", "enum", "anyOf", "pattern", "items", "properties", "patternProperties", "required"}
KNOWN |= {"additionalProperties", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "minLength", "minItems"}
KNOWN |= {"$schema", "$defs", "title", "description", "default"}


def problems(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str = "") -> list[str]:
    """Returns where a value does not fit a schema."""
    return list(_problems(value, schema, root, path))


def _problems(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any], path: str) -> Iterator[str]:
    assert set(schema) <= KNOWN, set(schema) - KNOWN
    if "$ref" in schema:
        yield from _problems(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    if "anyOf" in schema and all(problems(value, arm, root) for arm in schema["anyOf"]):
        yield f"{path}: {value!r} fits no arm"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: {value!r} is none of {schema['enum']}"
    names = schema.get("type", list(TYPES))
    if not any(_has_type(value, name) for name in ([names] if isinstance(names, str) else names)):
        yield f"{path}: {value!r} is no {names}"
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        yield f"{path}: {value!r} does not match"
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        above, below = schema.get("exclusiveMinimum", value - 1), schema.get("exclusiveMaximum", value + 1)
        if not (low <= value <= high and above < value < below):
            yield f"{path}: {value!r} is out of bounds"
    if isinstance(value, str | list) and len(value) < schema.get("minLength", schema.get("minItems", 0)):
        yield f"{path}: {value!r} is too short"
    if isinstance(value, list) and "items" in schema:
        for index, entry in enumerate(value):
            yield from _problems(entry, schema["items"], root, f"{path}[{index}]")
    if isinstance(value, dict):
        yield from (f"{path}: {name!r} is missing" for name in schema.get("required", ()) if name not in value)
        for name, entry in value.items():
            fitting = [inner for text, inner in schema.get("patternProperties", {}).items() if re.search(text, name)]
            if name in schema.get("properties", {}):
                fitting.append(schema["properties"][name])
            if not fitting and schema.get("additionalProperties") is False:
                yield f"{path}: there is no {name!r}"
            elif not fitting and isinstance(schema.get("additionalProperties"), dict):
                fitting.append(schema["additionalProperties"])
            for inner in fitting:
                yield from _problems(entry, inner, root, f"{path}.{name}")


def _has_type(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and not (isinstance(value, bool) and name in ("integer", "number"))
