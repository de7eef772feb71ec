"""The environments of `games.py`, importable by name here and in worker processes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from trl_ext.environments import GymEnvironment, gym

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def games() -> Any:
    return importlib.import_module("games")


MOVES = ["left", "down", "right", "up"]
WAY = ["down", "down", "right", "right", "down", "right"]


@pytest.fixture(scope="session")
def lake() -> type[GymEnvironment]:
    """Frozen Lake with ice that is not slippery."""
    return gym("FrozenLake-v1", actions=MOVES, is_slippery=False)


def played(kind: type[GymEnvironment], *actions: str, seed: int = 0) -> Any:
    """Returns an episode after some actions."""
    episode = kind()
    episode.reset(seed=seed)
    for action in actions:
        episode.act(action)
    return episode
