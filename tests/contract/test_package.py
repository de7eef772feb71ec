"""The package as it is built for a wheel, with the recipes in it, and what it says of itself."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests import processes
from trl_ext import __version__

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = {"table.py", "tiny/results/gdpo.png"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the package as every install but an editable one does, and returns the folder with what a wheel holds."""
    folder = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder), "build_py", "--build-lib"]
    processes.run([*command, str(folder / "lib")], cwd=ROOT, check=True)
    return folder / "lib"


def test_all_recipes_are_in_it_and_nothing_that_only_the_repository_needs(built: Path) -> None:
    here, there = ROOT / "recipes", built / "trl_ext" / "recipes"
    files = [file for file in here.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    ours = {str(file.relative_to(here)) for file in files}
    assert {str(file.relative_to(there)) for file in there.rglob("*") if file.is_file()} == ours - NOT_SHIPPED
    assert not list(built.rglob("__pycache__"))


def test_an_installed_package_finds_them_with_the_files_beside_them(built: Path, tmp_path: Path) -> None:
    code = """
from trl_ext.catalog import find, recipes
from trl_ext.compare import recipe
found = recipe.read("p3o")
print(recipes.folder(), len(recipes.recipes()), *found.arms["p3o-shifted"].plugins)
find.resolve(found.arms["p3o-shifted"].plugins)
"""
    environment = os.environ | {"PYTHONPATH": str(built), "PYTHONDONTWRITEBYTECODE": "1"}
    done = processes.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    folder, count, shift, name = done.stdout.split()
    assert Path(folder) == built / "trl_ext" / "recipes" and int(count) > 20
    assert shift == f"{built}/trl_ext/recipes/tiny/p3o.py:Shift" and name == "p3o"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == __version__
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
