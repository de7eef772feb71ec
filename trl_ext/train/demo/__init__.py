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
_EXTRAS = {"gguf": "gguf", "reasoning_gym": "reasoning-gym"}


def settings(kind: TrainerKind, plugins: list[str], say: Callable[[str], None] = print) -> dict[str, Any]:
    """Returns TRL's settings of the embedded default, with its model and data in place.

    Args:
        kind: The trainer of the run.
        plugins: Names of the plugins, for the name of the output folder.
        say: Called with a line for the user while files are made.

    Raises:
        ConfigError: The trainer has no embedded default, or packages are missing.
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
    from . import model, task

    values: dict[str, Any] = yaml.safe_load(DEFAULTS.read_text())
    values["output_dir"] = str(Path("runs") / "-".join(["demo", *plugins]))
    values["model_name_or_path"] = str(model.folder(say))
    values["dataset_name"] = str(task.folder(say))
    return values
