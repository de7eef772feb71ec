"""Recipes by name, and the Python files beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl_ext.catalog import recipes
from trl_ext.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_a_name_leads_to_the_small_recipe_and_another_one_to_that_of_the_paper() -> None:
    assert recipes.locate("gdpo") == str(ROOT / "recipes" / "tiny" / "gdpo.yaml")
    assert recipes.locate("gdpo-paper") == str(ROOT / "recipes" / "gdpo.yaml")
    assert recipes.locate("VL_DAC_doors") == str(ROOT / "recipes" / "tiny" / "vl-dac-doors.yaml")
    kinds = {name: kind for name, (kind, _) in recipes.recipes().items()}
    assert kinds["minigrid-view"] == "environment" and kinds["apo"] == "tiny" and kinds["apo-paper"] == "paper"


def test_every_file_but_the_warm_up_has_a_name() -> None:
    files = {file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name != "warmup"}
    assert {file for _, file in recipes.recipes().values()} == files


def test_a_file_of_the_user_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gdpo").write_text("max_steps: 1")
    assert recipes.locate("gdpo") == "gdpo"
    (tmp_path / "gdpo").unlink()
    (tmp_path / "gdpo").mkdir()  # a folder is no recipe
    assert recipes.locate("gdpo").endswith("gdpo.yaml")


def test_an_unknown_name_says_the_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"no recipe is called 'gdpp'.*Did you mean 'gdpo'.*`trl_ext recipes`"):
        recipes.locate("gdpp")


def test_a_path_that_is_not_there_names_the_recipe_that_is() -> None:
    with pytest.raises(ConfigError, match=r"recipes/tini/gdpo.yaml: there is no such file .*write gdpo in place of"):
        recipes.locate("recipes/tini/gdpo.yaml")
    assert recipes.locate("nowhere/mine.yaml") == "nowhere/mine.yaml"  # whoever reads it says so


def test_python_files_stand_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").touch()
    file = str(tmp_path / "mine.yaml")
    assert recipes.beside("mine.py:Shift", file) == f"{tmp_path / 'mine.py'}:Shift"
    assert recipes.beside("mine.py", file) == str(tmp_path / "mine.py")
    for other in ("gdpo", "package.module:Shift", "elsewhere.py", str(tmp_path / "mine.py")):
        assert recipes.beside(other, file) == other
