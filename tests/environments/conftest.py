"""The environments of `games.py`, importable by name here and in worker processes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def games() -> Any:
    return importlib.import_module("games")
