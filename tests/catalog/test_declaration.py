"""Declarations that are refused before a trainer exists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import Good
from trl_ext import PluginError
from trl_ext_hooks import Plugin, hookimpl


def bad(**attributes: Any) -> type[Plugin]:
    return type("Bad", (Good,), {"name": "bad", **attributes})


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"name": "Bad_Name"}, "`name` must be lower-case words joined by hyphens"),
        ({"trainers": ()}, "`trainers` must be a tuple with some of grpo, rloo, dpo; got ()"),
        ({"trainers": "grpo"}, "`trainers` must be a tuple with some of grpo, rloo, dpo; got 'grpo'"),
        ({"trainers": ("ppo",)}, "`trainers` must be a tuple with some of grpo, rloo, dpo; got ('ppo',)"),
        ({"Options": dict}, "`Options` must be a dataclass"),
        ({"needs": ("whole_group",)}, "`needs` holds 'whole_group'. Did you mean 'whole_groups'"),
        ({"needs": ("colum:x",)}, "`needs` holds 'colum:x'"),
        ({"needs": "old_logps"}, "`needs` must be a tuple of strings; got 'old_logps'"),
        ({"claims": ("estimtor",)}, "`claims` holds 'estimtor'. Did you mean 'estimator'?"),
        ({"fields": ["x"]}, "`fields` must be a tuple of strings; got ['x']"),
        ({"bibtex": "arXiv 2601.05242"}, "`bibtex` must hold BibTeX entries, such as '@misc{key, title = {...}}'; got"),
        ({"bibtex": "@misc{a, title = {b}"}, "`bibtex` must hold BibTeX entries"),
        ({"bibtex": "@misc{a, title = {b}}}"}, "`bibtex` must hold BibTeX entries"),
        ({"bibtex": ("@misc{a}",)}, "`bibtex` must hold BibTeX entries"),
        ({"honours": "beta"}, "`honours` must be a tuple of strings; got 'beta'"),
    ],
)
def test_wrong_declarations(attributes: dict[str, Any], expected: str, plugin: Callable[[type], str]) -> None:
    with refused(PluginError, expected):
        trl_ext.enable(plugin(bad(**attributes)))


class Misspelt(Good):
    name = "misspelt"

    @hookimpl
    def advantage(self, round: Any) -> None:
        return None


class Unmarked(Good):
    name = "unmarked"

    def advantages(self, round: Any) -> None:
        return None


class WrongArgument(Good):
    name = "wrong-argument"

    @hookimpl
    def advantages(self, rond: Any) -> None:
        return None


class HalfState(Good):
    name = "half-state"

    @hookimpl
    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (
            Misspelt,
            ["plugin 'misspelt'", "'advantage' is marked with @hookimpl, but no hook has", "mean 'advantages' or"],
        ),
        (Unmarked, ["plugin 'unmarked'", "the method 'advantages' is named like a hook and lacks @hookimpl"]),
        (WrongArgument, ["plugin 'wrong-argument'", "a hook does not fit its specification", "rond"]),
        (HalfState, ["plugin 'half-state'", "`state_dict` and `load_state_dict` belong together; implement both"]),
    ],
)
def test_wrong_hooks(cls: type[Plugin], expected: list[str], plugin: Callable[[type], str]) -> None:
    with refused(PluginError, *expected):
        trl_ext.enable(plugin(cls))
