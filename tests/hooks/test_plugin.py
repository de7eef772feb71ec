"""The base class of plugins: nested options, the first state, and what a declaration may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

import pytest

from trl_ext import PluginError
from trl_ext.catalog import find
from trl_ext_hooks import Plugin, hookimpl, option


class Nested(Plugin):
    name = "nested"
    trainers = ("grpo",)
    state = ("rounds",)

    @dataclass(frozen=True)
    class Options:
        first: int = option(3, ge=0, help="where to begin")

    options: Options

    def start(self) -> None:
        self.rounds = self.options.first
        self.starts = getattr(self, "starts", 0) + 1


def test_options_stand_inside_the_class(plugin: Callable[[type], str]) -> None:
    spec = find.resolve({plugin(Nested): {"first": 5}})[0]
    assert spec.options == Nested.Options(first=5) and spec.option_values == {"first": 5}
    made = spec.cls(spec.options)
    assert made.rounds == 5 and made.starts == 1
    assert Nested().rounds == 3  # its defaults


def test_an_author_may_still_write_the_constructor() -> None:
    class Old(Nested):
        def __init__(self, options: Any = None) -> None:
            super().__init__(options)
            self.more = self.rounds + 1

    assert Old().more == 4


def test_an_option_holds_its_bounds() -> None:
    (first,) = fields(Nested.Options)
    assert first.metadata["bounds"] == {"ge": 0}


def broken(**attributes: Any) -> type[Plugin]:
    return type("Broken", (Plugin,), {"name": "broken", "trainers": ("grpo",), **attributes})


@dataclass(frozen=True)
class BoundedText:
    word: str = option("a", gt=0, help="a word")


@dataclass(frozen=True)
class BoundedChoice:
    choice: Literal["a", "b"] = option("a", min_length=1, help="a choice")


@dataclass(frozen=True)
class LongNumber:
    number: float | None = option(None, min_length=2, help="a number")


@hookimpl
def state_dict(self: Any) -> dict[str, Any]:
    return {}


@hookimpl
def load_state_dict(self: Any, state: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"Options": BoundedText}, "the option 'word' has the bound `gt`, which fits a number; it is str."),
        ({"Options": BoundedChoice}, "'choice' has the bound `min_length`, which fits a text or a list; it is 'a' or"),
        ({"Options": LongNumber}, "the bound `min_length`, which fits a text or a list; it is float or null."),
        ({"state": "rounds"}, "`state` must be a tuple of strings; got 'rounds'"),
        (
            {"state": ("rounds",), "state_dict": state_dict, "load_state_dict": load_state_dict},
            "it declares `state`, which the core saves, and implements `state_dict` too. Keep one of them",
        ),
    ],
)
def test_wrong_declarations(attributes: dict[str, Any], expected: str, plugin: Callable[[type], str]) -> None:
    with pytest.raises(PluginError) as caught:
        find.resolve({plugin(broken(**attributes)): None})
    assert "plugin 'broken'" in str(caught.value) and expected in str(caught.value)
