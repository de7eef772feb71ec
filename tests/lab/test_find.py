"""Tasks by name, from files and from modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_ext import ConfigError, lab

SOURCE = """
import dataclasses
from trl_ext import lab
OTHER = dataclasses.replace(lab.task("letters"), name="other")
def made():
    return dataclasses.replace(OTHER, name="made")
def broken():
    return 7
NUMBER = 7
"""


def test_the_registry() -> None:
    assert list(lab.tasks()) == [
        *("loud-quiet", "modes", "calculator", "letters", "right-letter", "checks", "lookup", "line-walk", "grid-walk"),
        *("doors", "number-line", "frozen-lake", "minigrid", "minigrid-view"),
    ]
    for name, task in lab.tasks().items():
        assert lab.task(name) is task and task.name == name and task.summary
    assert lab.task("Loud_Quiet") is lab.task("loud-quiet")


def test_names_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"no task is called 'leters'\. Did you mean 'letters'\? Known: calculator, "):
        lab.task("leters")
    with pytest.raises(ConfigError, match=r"A task of your own is module:attribute or file\.py:attribute"):
        lab.task("")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(SOURCE)
    assert lab.task(str(file)).name == "other" == lab.task(f"{file}:OTHER").name
    assert lab.task(f"{file}:made").name == "made"
    for attribute, message in (
        ("OTHR", r"has no attribute 'OTHR'\. Did you mean 'OTHER'\? Known: OTHER"),
        ("NUMBER", r"NUMBER is int, not a trl_ext\.lab\.Task"),
        ("broken", r"broken is int, not a trl_ext\.lab\.Task"),
    ):
        with pytest.raises(ConfigError, match=message):
            lab.task(f"{file}:{attribute}")
    with pytest.raises(ConfigError, match=r"task file .*none\.py' does not exist"):
        lab.task(str(tmp_path / "none.py"))
    file = tmp_path / "two.py"
    file.write_text(SOURCE + 'MORE = dataclasses.replace(OTHER, name="more")\n')
    with pytest.raises(ConfigError, match=r"must define one task, found 2 \(OTHER, MORE\)\. Choose: .*two\.py:NAME"):
        lab.task(str(file))
    file = tmp_path / "bad.py"
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match=r"task file .*bad\.py' failed: ModuleNotFoundError"):
        lab.task(str(file))


def test_modules() -> None:
    assert lab.task("trl_ext.lab.builtin.modes:MODES") is lab.task("modes")
    assert lab.task("trl_ext.lab.builtin.modes:") is lab.task("modes")
    with pytest.raises(ConfigError, match=r"importing 'trl_ext\.lab\.nowhere' failed: ModuleNotFoundError"):
        lab.task("trl_ext.lab.nowhere:TASK")
