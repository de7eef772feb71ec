"""JSON Schema of annotated types."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, Literal

import pytest

from trl_ext.support.json_schema import any_of, of_dataclass, of_type, plain
from trl_ext_hooks import RewardName, option

from ..json_schema import problems


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass(frozen=True)
class Inner:
    name: RewardName = option(help="a reward")
    weight: float = option(1.0, help="how much", ge=0, le=2)


@dataclasses.dataclass(frozen=True)
class Outer:
    eps: float | None = option(None, help="small", gt=0)
    names: list[str] = option([], help="names", min_length=1)
    inner: Inner | None = option(None, help="a mapping")


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (bool, [True], [1, "true", None]),
        (int, [1, -2], [1.5, True, "1"]),
        (float, [1, 1.5, "1e-6", "-.5"], [True, "fast", None, [1]]),
        (str | None, ["a", None], [1, ["a"]]),
        (Literal["a", "b"], ["a"], ["c", None]),
        (Colour | None, ["red", None], ["blue"]),
        (list[int], [[], [1]], [1, ["1"]]),
        (tuple[str, ...] | str, ["a", ["a"]], [1]),
        (dict[str, float], [{}, {"a": 1}], [{"a": "x"}, []]),
        (Inner, [{"name": "a"}], [{}, {"name": "a", "weight": 3}, {"name": "a", "more": 1}]),
        (Any, [None, 1, "a", {}], []),
    ],
    ids=str,
)
def test_types(hint: Any, good: list[Any], bad: list[Any]) -> None:
    schema = of_type(hint)
    assert [value for value in good if problems(value, schema, schema)] == []
    assert [value for value in bad if not problems(value, schema, schema)] == []


def test_options_have_bounds_help_and_defaults() -> None:
    schema = of_dataclass(Outer)
    assert schema["properties"]["eps"]["description"] == "small"
    assert schema["properties"]["eps"]["default"] is None and schema["properties"]["names"]["default"] == []
    assert "required" not in schema and of_dataclass(Inner)["required"] == ["name"]
    assert not problems({"eps": 0.1, "names": ["a"], "inner": {"name": "b"}}, schema, schema)
    assert problems({"eps": 0}, schema, schema) and problems({"names": []}, schema, schema)


def test_null_joins_a_single_other_type() -> None:
    null = {"type": "null"}
    assert any_of([{"type": "string"}, null, null]) == {"type": ["string", "null"]}
    assert any_of([{"type": ["string", "null"]}, null]) == {"type": ["string", "null"]}
    assert any_of([{"enum": ["a"]}, null]) == {"enum": ["a", None]}
    assert any_of([{"type": "string"}, {}]) == {}


def test_plain_values() -> None:
    assert plain((Colour.RED, {"a": 1})) == ["red", {"a": 1}]
    assert plain(math.inf) is plain([object()]) is plain({"a": math.nan}) is dataclasses.MISSING
