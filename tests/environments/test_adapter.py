"""The class that `gym` makes: its tool, and what it refuses."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
from transformers.utils import get_json_schema

from tests import processes
from trl_ext import ConfigError
from trl_ext.environments import GymEnvironment, gym
from trl_ext.environments.actions import action_reader
from trl_ext.environments.player import Spaces
from trl_ext.trl_internals import seams

from .conftest import MOVES


def test_the_tool_has_a_schema_and_reset_is_none(lake: type[GymEnvironment]) -> None:
    function = get_json_schema(lake().act)["function"]
    assert function["name"] == "act" and function["parameters"]["required"] == ["action"]
    assert function["parameters"]["properties"]["action"]["enum"] == MOVES
    assert "left, down, right, up" in lake.prompt() and lake.__name__ == "FrozenLakev1"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gym("FrozenLak-v1"), r"Did you mean: `FrozenLake`\?"),
        (lambda: gym("MiniGrid-Nowhere-v0"), r"written package:ID, as in minigrid:ID"),
        (lambda: gym("FrozenLake-v1", slippery=1), r"unexpected keyword argument 'slippery'"),
        (lambda: gym("FrozenLake-v1", slippery=1, step_seconds=9), r"unexpected keyword argument 'slippery'"),
        (lambda: gym("FrozenLake-v1", actions=["a"]), r"`actions` is a list of 1 words, .* Discrete\(4\)"),
        (
            lambda: gym("FrozenLake-v1", actions={"a": 4}),
            r"^FrozenLake-v1: `actions` maps 'a' to 4, which is not in",
        ),
        (lambda: gym("FrozenLake-v1", actions=["a", "A", "b", "c"]), r"differ in more than case"),
        (
            lambda: gym("minigrid:MiniGrid-Empty-5x5-v0"),
            r"^MiniGrid-Empty-5x5-v0: .*environments\.minigrid_text",
        ),
        (lambda: gym("FrozenLake-v1", max_steps=0), r"`max_steps` must be 1 or more"),
        (lambda: gym("FrozenLake-v1", step_seconds=0), r"`step_seconds` must be positive"),
        (lambda: gym("FrozenLake-v1", render="human"), r"`render` is \"image\" or nothing"),
        (lambda: gym("FrozenLake-v1", observe="math.nothing"), r"there is no 'math\.nothing'"),
        (lambda: gym(gymnasium.Env, is_slippery=True), r"`env` is a function"),
        (lambda: action_reader(Spaces(gymnasium.spaces.Dict(), None, {}, None), None), r"Give `actions`: a mapping"),
    ],
)
def test_what_cannot_work_is_said_at_once(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_without_gymnasium_it_is_said_what_to_install() -> None:
    code = """
        import sys
        import trl_ext.environments
        assert not {"gymnasium", "torch", "numpy"} & set(sys.modules)
        sys.modules["gymnasium"] = None
        trl_ext.environments.gym("FrozenLake-v1")
    """
    done = processes.run_python(textwrap.dedent(code))
    assert 'gymnasium is not installed: pip install "trl_ext[environments]"' in done.stderr, done.stderr


def test_pictures_need_a_tool_loop_that_carries_them(games: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "trl_version", lambda: seams.Version("1.14.0"))
    with pytest.raises(ConfigError, match=r"pictures need TRL 1\.15 or later; .* of 1\.14\.0 .*`observe`"):
        gym(games.Painted, render="image")
    gym(games.Painted, observe=str)  # in words they do not
