"""Plugins by name, file and module, and requests that cannot be met."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import trl_ext
from tests.refusals import refused
from tests.sample_plugins import Good
from trl_ext import ConfigError, OptionError, PluginError, UnknownPluginError
from trl_ext.catalog import find


def test_unknown_plugin_with_near_names() -> None:
    with refused(UnknownPluginError, "no plugin is called 'gdop'. Did you mean 'gdpo'", "gdpo"):
        trl_ext.enable("gdop")


def test_nothing_asked_for() -> None:
    with refused(ConfigError, "name at least one plugin, for example trl_ext.enable('gdpo')"):
        trl_ext.enable()


def test_asked_for_twice(plugin: Callable[[type], str]) -> None:
    with refused(ConfigError, "plugin 'good' is asked for twice"):
        trl_ext.enable(plugin(Good), plugin(Good))


def test_no_such_module_and_no_such_attribute(plugin: Callable[[type], str]) -> None:
    with refused(PluginError, "importing 'no_such_module' failed: ModuleNotFoundError"):
        trl_ext.enable("no_such_module:Thing")
    module = plugin(Good).partition(":")[0]
    with refused(PluginError, f"{module} has no attribute 'Mode'"):
        trl_ext.enable(f"{module}:Mode")


def test_something_else_than_a_plugin(plugin: Callable[[type], str]) -> None:
    with refused(PluginError, "is not a subclass of trl_ext_hooks.Plugin"):
        trl_ext.enable(plugin(dict))


HEAD = "from trl_ext_hooks import Plugin\n"
ONE = "class {0}(Plugin):\n    name = '{1}'\n    trainers = ('grpo',)\n"


def test_a_missing_file(tmp_path: Path) -> None:
    with refused(UnknownPluginError, "method.py' does not exist (looked in "):
        trl_ext.enable(str(tmp_path / "method.py"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", "must define one plugin class, found 0 (none)"),
        (HEAD, "must define one plugin class, found 0 (none)"),
        (HEAD + ONE.format("A", "a") + ONE.format("B", "b"), "found 2 (A, B). Choose: "),
        ("import nowhere_at_all\n", "failed: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def broken(:\n", "failed: SyntaxError"),
    ],
)
def test_a_file_without_one_plugin(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text(text)
    before = set(sys.modules)
    with refused(PluginError, str(tmp_path / "method.py"), expected):
        trl_ext.enable(str(tmp_path / "method.py"))
    if "failed" in expected:
        assert not {name for name in set(sys.modules) - before if name.startswith("trl_ext_file_")}


def test_a_class_of_a_file_can_be_chosen(tmp_path: Path) -> None:
    file = tmp_path / "two.py"
    file.write_text(HEAD + ONE.format("A", "a") + ONE.format("B", "b"))
    cls, origin, version = find.find(f"{file}:B")
    assert (cls.name, origin, version) == ("b", str(file), "file")
    with refused(PluginError, "has no attribute 'C'", "Known: A, B"):
        trl_ext.enable(f"{file}:C")


def test_options_that_are_no_mapping() -> None:
    with refused(OptionError, "options of plugin 'gdpo' must be a mapping, got 0.1"):
        trl_ext.enable({"gdpo": 0.1})  # type: ignore[dict-item]


def test_an_option_of_a_plugin_that_is_not_enabled() -> None:
    expected = "--set otc.rate: plugin 'otc' is not enabled. Known: gdpo. Add it: --plugin otc"
    with refused(OptionError, expected):
        find.merge(["gdpo"], None, {"otc": {"rate": 1}})


def test_merging_prefers_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD + ONE.format("Mine", "my-own"))
    block = {"GDPO": {"group_eps": 1e-3, "batch_eps": 1e-3}, str(file): None}
    merged = find.merge(["gdpo"], block, {"gdpo": {"group_eps": 1e-2}, "my-own": {"x": 1}})
    assert merged == {"gdpo": {"group_eps": 1e-2, "batch_eps": 1e-3}, str(file): {"x": 1}}
    with refused(OptionError, "`plugins:` must be a mapping of plugin names to options, got ['gdpo']"):
        find.merge([], ["gdpo"], {})  # type: ignore[arg-type]
    with refused(OptionError, "options of plugin 'gdpo' must be a mapping, got 3"):
        find.merge([], {"gdpo": 3}, {})
