"""What users may write for an option: types, bounds, names of rewards and columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import trl_ext
from trl_ext import ConfigError, OptionError
from trl_ext.catalog import builtins, find
from trl_ext.catalog.options import build, coerce
from trl_ext_hooks import ColumnName, Plugin, RewardName, option


@dataclass(frozen=True)
class Rule:
    target: RewardName = option(help="a reward")
    weight: float = option(1.0, gt=0, help="a factor")


class Bounded(Plugin):
    name = "bounded"
    trainers = ("grpo", "rloo")

    @dataclass(frozen=True)
    class Options:
        rate: float = option(0.5, gt=0, le=1, help="a rate")
        count: int | None = option(None, ge=1, help="a number or nothing")
        word: str = option("a", min_length=1, help="a word")
        words: tuple[str, ...] = option(("a",), min_length=2, help="words")
        either: float | str = option("auto", ge=0, help="a number or a word")
        table: dict[str, float] = option({}, help="numbers by name")
        correct_reward: RewardName | None = option(None, help="a reward")
        rewards: tuple[RewardName, ...] = option((), help="rewards")
        rules: tuple[Rule, ...] = option((), help="rules")
        answer: ColumnName = option("", help="a column")

    options: Options


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rate": 0}, "bounded.rate: expected float, > 0, <= 1, got 0. (Input should be greater than 0)"),
        ({"rate": "1.5"}, "bounded.rate: expected float, > 0, <= 1, got '1.5'. (Input should be less than or equal"),
        ({"rate": "nan"}, "bounded.rate: expected float, > 0, <= 1, got 'nan'"),
        ({"rate": [1]}, "bounded.rate: expected float, > 0, <= 1, got [1]"),
        ({"count": 0}, "bounded.count: expected int or null, >= 1, got 0"),
        ({"count": 1.5}, "bounded.count: expected int or null, >= 1, got 1.5"),
        ({"word": ""}, "bounded.word: expected str, not empty, got ''"),
        ({"words": ["a"]}, "bounded.words: expected a list of str, at least 2 long, got ['a']"),
        ({"words": ["a", 1]}, "expected a list of str, at least 2 long, got ['a', 1]. (entry 1: Input should be a"),
        ({"either": -1}, "bounded.either: expected float or str, >= 0, got -1"),
        ({"table": {"a": "much"}}, "bounded.table: expected a mapping of str to float, got {'a': 'much'}"),
        ({"correct_reward": 3}, "bounded.correct_reward: expected reward name or null, got 3"),
        ({"answer": None}, "bounded.answer: expected column name, got None"),
        ({"rules": [{"target": "a", "weight": 0}]}, "Rule.weight: expected float, > 0, got 0"),
        ({"rules": [{"weight": 1}]}, "plugin 'Rule' needs a value for 'target'"),
    ],
)
def test_wrong_values(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=re.escape(expected)):
        build(Bounded.Options, values, "bounded")


def test_right_values() -> None:
    made = build(
        Bounded.Options,
        {
            "rate": "1e-4",
            "count": 2.0,
            "words": ["a", "b"],
            "either": "1e-3",
            "table": {"a": "1e-2"},
            "rules": [{"target": "digits"}],
        },
        "bounded",
    )
    assert made == Bounded.Options(
        rate=1e-4, count=2, words=("a", "b"), either=1e-3, table={"a": 0.01}, rules=(Rule("digits"),)
    )
    assert type(made.count) is int and build(Bounded.Options, {"count": None}, "bounded").count is None


@pytest.mark.parametrize(("hint", "value"), [(int, True), (float, False), (bool, 1), (str, 1), (int, "1")])
def test_nothing_is_taken_for_another_type(hint: type, value: Any) -> None:
    with pytest.raises(ValueError, match="Input should be"):
        coerce(value, hint)


@pytest.mark.parametrize("name", builtins.BUILTINS)
def test_defaults_of_built_in_options_keep_their_own_bounds(name: str) -> None:
    cls = find.find(name)[0]
    defaults = {field.name: field.default for field in fields(cls.Options) if field.default is not MISSING}
    if name == "polychromic":
        defaults["strategy"] = "trl_ext_plugins.polychromic.strategies.last_text"  # has no default
    assert build(cls.Options, defaults, name) == cls.Options(**defaults)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"correct_reward": "digit"},
            "bounded: no reward function is called 'digit'. Did you mean 'digits'? Known: brevity, digits. Correct "
            "bounded.correct_reward.",
        ),
        (
            {"rewards": ["digits", "none"]},
            "no reward function is called 'none'. Known: brevity, digits. Correct bounded",
        ),
        ({"rules": [{"target": "brevty"}]}, "called 'brevty'. Did you mean 'brevity'? Known: brevity, digits. Correct"),
        (
            {"answer": "solution"},
            "the training data has no column 'solution'; it has prompt, answer, index. Correct",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_name_that_the_run_lacks(
    kind: str, values: dict[str, Any], expected: str, build: Any, plugin: Callable[[type], str]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)), trl_ext.enable({plugin(Bounded): values}):
        build(kind)


def test_names_become_needs(build: Any, plugin: Callable[[type], str]) -> None:
    values = {"correct_reward": "digits", "rules": [{"target": "digits"}], "answer": "index"}
    with trl_ext.enable({plugin(Bounded): values}):
        plan = build()._trl_ext.plan
    assert plan.needs == {"reward:digits": ("bounded",), "column:index": ("bounded",)}
    with trl_ext.enable({plugin(Bounded): {"correct_reward": "", "answer": ""}}):
        assert build()._trl_ext.plan.needs == {}  # nothing is named


def test_show_prints_bounds_and_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from trl_ext.cli.main import main

    file = tmp_path / "method.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from trl_ext_hooks import Plugin, RewardName, option\n"
        "class Shown(Plugin):\n"
        "    name = 'shown'\n"
        "    trainers = ('grpo',)\n"
        "    state = ('kappa',)\n"
        "    def start(self):\n"
        "        self.kappa = 0\n"
        "    @dataclass(frozen=True)\n"
        "    class Options:\n"
        "        rate: float = option(0.5, gt=0, le=1, help='x')\n"
        "        who: RewardName | None = option(None, help='x')\n"
    )
    assert main(["show", str(file)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "float, > 0, <= 1" in shown and "reward name or null" in shown and "kappa" in shown
