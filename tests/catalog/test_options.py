"""Options of every type, right and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import Good
from trl_ext import OptionError
from trl_ext.catalog import find
from trl_ext.catalog.options import coerce, parse_set
from trl_ext_hooks import option


@dataclasses.dataclass(frozen=True)
class Inner:
    target: str = option(help="a name")
    weight: float = option(1.0, help="a number")


@dataclasses.dataclass(frozen=True)
class Many:
    needed: int = option(help="no default")
    rate: float = option(0.5, help="a number")
    count: int = option(3, help="a whole number")
    flag: bool = option(False, help="yes or no")
    mode: Literal["a", "b"] = option("a", help="a choice")
    limit: float | None = option(None, help="a number or nothing")
    names: tuple[str, ...] = option((), help="names")
    table: dict[str, float] = option({}, help="numbers by name")
    inner: list[Inner] = option([], help="nested")

    def __post_init__(self) -> None:
        if self.rate > 10:
            raise ValueError("rate must be at most 10")


class WithOptions(Good):
    name = "with-options"
    Options = Many


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"group_epsilon": 1}, "plugin 'gdpo' has no option 'group_epsilon'. Did you mean 'group_eps'"),
        ({"group_eps": "much"}, "gdpo.group_eps: expected float, > 0, got 'much'"),
        ({"group_eps": True}, "gdpo.group_eps: expected float, > 0, got True"),
        ({"group_eps": None}, "gdpo.group_eps: expected float, > 0, got None"),
        ({"batch_norm": "yes"}, "gdpo.batch_norm: expected bool, got 'yes'"),
        ({"batch_norm": 1}, "gdpo.batch_norm: expected bool, got 1"),
        ({"whiten": "rows"}, "gdpo.whiten: expected 'sequence' or 'token', got 'rows'"),
        (
            {"conditions": {"target": "a"}},
            "gdpo.conditions: expected a list of a mapping with target, given, threshold",
        ),
        ({"conditions": [{"target": "a", "gven": "b"}]}, "has no option 'gven'. Did you mean 'given'?"),
        ({"conditions": [{"target": "a"}]}, "needs a value for 'given'"),
    ],
)
def test_wrong_options_of_gdpo(values: dict[str, Any], expected: str) -> None:
    with refused(OptionError, expected):
        trl_ext.enable("gdpo", gdpo=values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "plugin 'with-options' needs a value for 'needed': --set with-options.needed=VALUE, or `plugins:"),
        ({"needed": 1.5}, "with-options.needed: expected int, got 1.5"),
        ({"needed": True}, "with-options.needed: expected int, got True"),
        ({"needed": "3"}, "with-options.needed: expected int, got '3'"),
        ({"needed": 1, "rate": 11}, "plugin 'with-options': rate must be at most 10"),
        ({"needed": 1, "limit": "x"}, "with-options.limit: expected float or null, got 'x'"),
        ({"needed": 1, "names": "abc"}, "with-options.names: expected a list of str, got 'abc'"),
        ({"needed": 1, "names": [1]}, "with-options.names: expected a list of str, got [1]"),
        ({"needed": 1, "table": [1]}, "with-options.table: expected a mapping of str to float"),
    ],
)
def test_wrong_options_of_every_type(values: dict[str, Any], expected: str, plugin: Callable[[type], str]) -> None:
    with refused(OptionError, expected):
        trl_ext.enable({plugin(WithOptions): values})


def test_right_options_of_every_type(plugin: Callable[[type], str]) -> None:
    values = {"needed": 2.0, "rate": "1e-3", "count": 4, "flag": True, "mode": "b", "limit": 2, "names": ["x"]}
    values |= {"table": {"a": 1.0}, "inner": [{"target": "t"}, Inner("u", 2.0)]}
    (spec,) = find.resolve({plugin(WithOptions): values})
    expected = Many(2, 1e-3, 4, True, "b", 2.0, ("x",), {"a": 1.0}, [Inner("t"), Inner("u", 2.0)])
    assert spec.options == expected and type(spec.options.needed) is int


def test_defaults_are_not_shared(plugin: Callable[[type], str]) -> None:
    reference = plugin(WithOptions)
    one, other = (find.resolve({reference: {"needed": 1}})[0].options for _ in range(2))
    assert one.table is not other.table and one.inner is not other.inner


@pytest.mark.parametrize("text", ["gdpo=1", "gdpo.x", ".x=1", "gdpo.=1", "x=1.5"])
def test_a_malformed_assignment(text: str) -> None:
    with refused(OptionError, f"--set {text}: expected PLUGIN.OPTION=VALUE, for example gdpo.group_eps=1e-4"):
        parse_set([text])


def test_assignments() -> None:
    assert parse_set(["a.x=1", "a.y=[1, two]", "b.z={k: 0.5}", "a.t=p=q"]) == {
        "a": {"x": 1, "y": [1, "two"], "t": "p=q"},
        "b": {"z": {"k": 0.5}},
    }
    with refused(OptionError, "--set a.x=[1: the value is not valid YAML"):
        parse_set(["a.x=[1"])


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (float, np.float32(0.5), 0.5),
        (float, np.float64(0.5), 0.5),
        (float, np.int64(2), 2.0),
        (int, np.int64(2), 2),
        (int, np.float64(2.0), 2),
        (tuple[int, ...], [np.int32(1)], (1,)),
    ],
)
def test_numbers_of_numpy_become_plain(hint: Any, value: Any, expected: Any) -> None:
    read = coerce(value, hint)
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize(("hint", "value"), [(int, np.bool_(True)), (int, np.float64(2.5))])
def test_numbers_of_numpy_that_do_not_fit(hint: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="valid"):
        coerce(value, hint)
