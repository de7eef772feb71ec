"""Embedded default of `trl_ext train`: a small real model and an arithmetic task, for runs that name neither.

Its files are made once and kept in a cache folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trl_ext_hooks import TrainerKind

from ...errors import ConfigError

DEFAULTS = Path(__file__).with_name("default.yaml")
TAKES = "about 6 minutes for 25 steps on two CPU cores, as once measured"
_EXTRAS = {"gguf": "gguf", "reasoning_gym": "reasoning-gym"}


def check(kind: TrainerKind) -> None:
    """Refuses a run for which there is no embedded default.

    Raises:
        ConfigError: The trainer has none, or packages are missing.
    """
    if kind == "dpo":
        raise ConfigError(
            "the embedded default is a task with rewards, for GRPO and RLOO, and this run uses DPO. Name a model and "
            "data: --model_name_or_path MODEL --dataset_name DATASET"
        )
    missing = [package for module, package in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the embedded default needs {' and '.join(missing)}: pip install 'trl_ext[demo]'. To train something "
            f"else, name it: --model_name_or_path MODEL --dataset_name DATASET"
        )


def settings(plugins: list[str]) -> dict[str, Any]:
    """Returns TRL's settings of the embedded default except for its model and data, which `make` returns.

    Args:
        plugins: Names of the plugins, for the name of the output folder.
    """
    values: dict[str, Any] = yaml.safe_load(DEFAULTS.read_text())
    values["output_dir"] = str(Path("runs") / "-".join(["demo", *plugins]))
    return values


def make(say: Callable[[str], None] = print) -> dict[str, str]:
    """Puts the model and the data in place, and returns the settings that name them.

    Args:
        say: Called with a line for the user while files are made.
    """
    from . import model, task

    return {"model_name_or_path": str(model.folder(say)), "dataset_name": str(task.folder(say))}


def places(say: Callable[[str], None] = print) -> dict[str, str]:
    """Returns the same settings without making the model, whose folder may be missing then."""
    from . import model, task

    return {"model_name_or_path": str(model.place() or model.HUB), "dataset_name": str(task.folder(say))}
