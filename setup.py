"""The build step that copies `recipes/` into wheels as `trl_ext/recipes/`. Everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.png", "table.py")
"""Files that only the repository needs: pictures of its pages, and the script that writes its tables."""


class BuildWithRecipes(build_py):
    """Builds the packages, then adds the recipes. An editable install uses the folder of the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "trl_ext" / "recipes"
            shutil.rmtree(target, ignore_errors=True)  # a recipe that was removed does not stay in an old build folder
            shutil.copytree("recipes", target, ignore=NOT_SHIPPED)


setup(cmdclass={"build_py": BuildWithRecipes})
