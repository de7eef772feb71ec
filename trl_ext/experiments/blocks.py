"""Values of a YAML block, checked: each function returns the value, or says where it is and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError, near


def mapping(value: Any, where: str, known: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {value!r}.")
    found = {str(key): entry for key, entry in value.items()}
    for key in found:
        if known is not None and key not in known:
            raise ConfigError(f"{where} has no key {key!r}.{near(key, known)}")
    return found


def choice(value: Any, choices: Sequence[Any], where: str) -> Any:
    if value is not None and value not in choices:
        raise ConfigError(f"{where}: {value!r} is none of the choices.{near(str(value), choices)}")
    return value


def typed(value: Any, kind: type, where: str) -> Any:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}.")
    return value


def number(value: Any, where: str, expected: str = "a number") -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: expected {expected}, got {value!r}.") from None


def count(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{where}: expected a whole number of at least 1, got {value!r}.")
    return value
