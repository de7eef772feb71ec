"""Look-up of recipes: the YAML files that come with trl_ext, by name.

Wheels hold them in `trl_ext/recipes/`, a checkout in `recipes/` beside the package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, near
from ..support import imports

Kind = Literal["tiny", "environment", "paper"]

_PLACES: dict[Kind, tuple[str, str]] = {
    "tiny": ("tiny", "{}"),
    "environment": ("environments", "{}"),
    "paper": (".", "{}-paper"),
}
"""Kind -> the folder with its files, and how a name is made of the name of a file."""


def folder() -> Path:
    """Returns the folder with the recipes."""
    package = Path(__file__).parents[1]
    shipped = package / "recipes"
    return shipped if shipped.is_dir() else package.parent / "recipes"


def recipes() -> dict[str, tuple[Kind, Path]]:
    """Returns name -> kind and file, those for small machines first."""
    return {
        name.format(file.stem): (kind, file)
        for kind, (place, name) in _PLACES.items()
        for file in sorted((folder() / place).glob("*.yaml"))
    }


def locate(reference: str) -> str:
    """Returns the path of a recipe from its name or its path. A file of the user wins over a name.

    Raises:
        ConfigError: No recipe has that name.
    """
    if Path(reference).is_file():
        return reference
    known = recipes()
    is_path = reference.endswith((".yaml", ".yml")) or os.sep in reference
    if not is_path:
        name = reference.lower().replace("_", "-")
        if name in known:
            return str(known[name][1])
        raise ConfigError(
            f"no recipe is called {reference!r}, and there is no such file (looked in {Path.cwd()})."
            f"{near(name, known)} `trl_ext recipes` describes them."
        )
    if Path(reference).stem in known:
        raise ConfigError(
            f"{reference}: there is no such file (looked in {Path.cwd()}). A recipe of that name comes with trl_ext: "
            f"write {Path(reference).stem} in place of the path."
        )
    return reference


def beside(reference: str, file: str) -> str:
    """Returns a reference such as `rewards.py:Shift` with the path of that file, if it stands beside a YAML file.

    Args:
        reference: What the YAML file says. Names and modules stay as they are, as do paths that do not exist there.
        file: The YAML file.
    """
    if imports.is_file(reference):
        python, attribute = imports.split_file(reference)
        neighbour = Path(file).parent / python
        if neighbour.is_file():
            return f"{neighbour}:{attribute}" if attribute else str(neighbour)
    return reference
