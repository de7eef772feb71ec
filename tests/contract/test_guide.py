"""The guide for authors says what the code does: its plugins conform, its test passes, its tables are complete."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tests import processes
from trl_ext.catalog import builtins, declaration
from trl_ext.cli.new import scaffold
from trl_ext.testing import conformance
from trl_ext_hooks import Plugin

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "hooks" / "README.md").read_text()
FILES = {
    code.partition("\n")[0].removeprefix("# "): code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
}
PLUGINS = [name for name in FILES if not name.startswith("test_")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with all files of the guide under the names that their first lines give."""
    for name, code in FILES.items():
        assert re.fullmatch(r"\w+\.py", name), "the first line of every block is a comment with a file name"
        (tmp_path / name).write_text(code)
    return tmp_path


def test_the_first_plugin_takes_ten_lines() -> None:
    assert len([line for line in FILES[PLUGINS[0]].splitlines() if line]) <= 10


@pytest.mark.parametrize("name", PLUGINS)
def test_plugins_conform(name: str, folder: Path) -> None:
    checks = conformance(str(folder / name), folder / "runs")
    assert len(checks) > 4
    assert not [check for check in checks if not check.passed]


@pytest.mark.slow
def test_the_test_of_the_guide_passes(folder: Path) -> None:
    (test,) = [name for name in FILES if name.startswith("test_")]
    done = processes.run([sys.executable, "-m", "pytest", "-q", test], cwd=folder)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-2000:]


def test_it_names_every_attribute_of_a_declaration() -> None:
    section = GUIDE.partition("## Needs, claims and settings")[2].partition("\n## ")[0]
    declared = {name for name in Plugin.__annotations__ if name != "options"}
    assert declared <= set(re.findall(r"`(\w+)`", section))


def test_the_table_of_stages_has_every_hook() -> None:
    table = GUIDE.partition("## Order of stages")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"\[`(\w+)`\]", table)) == sorted(declaration.HOOKS)


def test_the_entry_point_is_the_one_that_packages_get(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    printed = tomllib.loads(block)["project"]["entry-points"]
    package = scaffold("baseline", tmp_path / "package")
    written = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]
    assert printed == written and set(printed) == {builtins.GROUP}
