"""Blocks of a YAML file as pydantic models, whose errors name the key, what it holds and what was expected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from ..errors import ConfigError, near

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "int_type": "a whole number",
    "list_type": "a list",
    "none_required": "no value",
    "string_type": "text",
}
"""Kind of a pydantic error -> what was expected, filled with the error's own values."""
_CONSEQUENCE = "default_factory_not_called"
"""Kind of the error of a default that depends on a value with an error of its own."""


class Block(BaseModel):
    """A mapping of a YAML file. Values are not converted, and a validator refuses one by raising `ConfigError`.

    A file is read with a context, and names keys by their aliases. Python may construct a block by the names of its
    fields.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses unknown keys with the nearest known ones, and missing keys with their description."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping | None):
            raise ConfigError(f"expected a mapping, got {value!r}.")
        content = {str(key): entry for key, entry in (value or {}).items()}
        if info.context is None:
            return content
        fields = {str(field.validation_alias or name): field for name, field in cls.model_fields.items()}
        for key in content:
            if key not in fields:
                raise ConfigError(f"there is no key {key!r}.{near(key, fields)}")
        for key, field in fields.items():
            if field.is_required() and key not in content:
                raise ConfigError(f"`{key}` is missing, {field.description}.")
        return content


def explain(error: ValidationError, file: str, block: str) -> str:
    """Returns a line for every mistake in a block of a file."""
    entries = [entry for entry in error.errors(include_url=False) if entry["type"] != _CONSEQUENCE]
    return "\n".join(f"{file}: {block}{_path(entry['loc'])}: {_sentence(entry)}" for entry in entries)


def _path(location: tuple[int | str, ...]) -> str:
    """Returns `.metrics[0].name` for `("metrics", 0, "name")`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location)


def _sentence(entry: Any) -> str:
    """Says what was expected and what came."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "value_error":  # raised by a validator of ours
        return str(context["error"])
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", context["expected"])
        return f"{value!r} is none of the choices.{near(str(value), choices)}"
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else entry["msg"].removeprefix("Input should be ")
    return f"expected {expected}, got {value!r}."


def _read_number(value: Any) -> float:
    """Takes text such as `1e-3` as well, which YAML does not read as a number."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"expected a number, got {value!r}.") from None


Number = Annotated[float, BeforeValidator(_read_number), Field(allow_inf_nan=False)]
Margin = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_read_number)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_read_number)]
Count = Annotated[int, Field(ge=1)]
