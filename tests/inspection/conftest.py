"""One recorded run that all tests look at."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trl_ext.inspection import file_format
from trl_ext.inspection.file_format import Recording

SCRIPT = Path(__file__).parent / "scripts" / "rounds.py"


@pytest.fixture(scope="session")
def rounds() -> ModuleType:
    """The script with the plugin and the run."""
    spec = importlib.util.spec_from_file_location("rounds_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def run(rounds: ModuleType, model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trainer that recorded two of its three rounds; its plugins are off again."""
    return rounds.train(model, tmp_path_factory.mktemp("recorded"))


@pytest.fixture(scope="session")
def folder(run: Any) -> Path:
    """The output folder of that run."""
    return Path(run.args.output_dir)


@pytest.fixture(scope="session")
def recorded(folder: Path) -> Recording:
    """Its first round."""
    return file_format.read(folder / "inspect" / "round-1.json")
