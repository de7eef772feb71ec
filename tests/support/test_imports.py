"""Modules from files: loaded once, and again when they were edited."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import trl_ext
from tests.refusals import refused
from trl_ext import PluginError
from trl_ext.support.imports import load_file

SOURCE = """
from trl_ext_hooks import Plugin, hookimpl

class Scales(Plugin):
    name = "scales"
    trainers = ("grpo",)
    FACTOR = 2

    @hookimpl
    def advantages(self, round):
        return self.FACTOR * round.advantages
"""


def test_an_edited_file_is_loaded_again(tmp_path: Path) -> None:
    """The edit keeps the size and comes within a second, so that a cache of bytecode would not notice it."""
    file = tmp_path / "scales.py"
    file.write_text(SOURCE)
    with trl_ext.enable(str(file)) as handle:
        first = handle.specs[0].cls
    with trl_ext.enable(str(file)) as handle:
        assert handle.specs[0].cls is first
    file.write_text(SOURCE.replace("FACTOR = 2", "FACTOR = 3"))
    with trl_ext.enable(str(file)) as handle:
        second = handle.specs[0].cls
    assert (first.FACTOR, second.FACTOR) == (2, 3)
    assert sys.modules[second.__module__].Scales is second


def test_an_edit_that_fails_leaves_what_was_loaded(tmp_path: Path) -> None:
    file = tmp_path / "scales.py"
    file.write_text(SOURCE)
    module = load_file(file, "plugin", PluginError)
    for broken in ("1 / 0", "class:", "raise KeyboardInterrupt"):
        file.write_text(broken)
        if broken.endswith("Interrupt"):
            with pytest.raises(KeyboardInterrupt):
                load_file(file, "plugin", PluginError)
        else:
            with refused(PluginError, f"plugin file {str(file)!r} failed: "):
                load_file(file, "plugin", PluginError)
        assert sys.modules[module.__name__] is module
    file.write_text(SOURCE)
    assert load_file(file, "plugin", PluginError) is module


def test_a_file_that_fails_at_first_leaves_no_module(tmp_path: Path) -> None:
    file = tmp_path / "broken_at_first.py"
    file.write_text("1 / 0")
    with refused(PluginError, "ZeroDivisionError: division by zero"):
        load_file(file, "plugin", PluginError)
    assert not [name for name in sys.modules if "broken_at_first" in name]
