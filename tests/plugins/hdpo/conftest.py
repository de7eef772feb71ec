"""Rollouts that are written down, and trainers that run on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import trl_ext
from trl_ext.testing import Scripted, reported, tiny_data

Rows = list[dict[str, Any]]
Run = Callable[..., tuple[Any, list[Any]]]


def _rollout(turns: int, right: float | None, form: float | None = 1.0, tokens: int = 3, masked: int = 0) -> Any:
    """A rollout of some tokens, the second to the `masked + 1`st of which the model did not write."""
    ids = [10 + (7 * turns + 3 * j + 5 * int(bool(right)) + 11 * tokens) % 80 for j in range(tokens)]
    mask = [int(not 0 < j <= masked) for j in range(tokens)]
    return {"turns": turns, "right": right, "form": form, "completion_ids": ids, "env_mask": mask}


@pytest.fixture
def rollout() -> Callable[..., dict[str, Any]]:
    """`rollout(calls, right, form, tokens, masked)`."""
    return _rollout


@pytest.fixture
def mixed() -> Rows:
    """Two prompts: three right ones with 0, 2 and 2 calls, and two right ones with 1 and 4 calls."""
    return [
        _rollout(0, 1.0, 1.0, 3),
        _rollout(2, 1.0, 1.0, 6, masked=2),
        _rollout(2, 1.0, 0.0, 4, masked=1),
        _rollout(3, 0.0, 1.0, 5, masked=3),
        _rollout(1, 1.0, 1.0, 7, masked=4),
        _rollout(4, 1.0, 1.0, 5, masked=2),
        _rollout(0, 0.0, 0.0, 2),
        _rollout(5, 0.0, 1.0, 8, masked=5),
    ]


@pytest.fixture
def all_right() -> Rows:
    """Two prompts that are always answered right; the second one always with 2 calls."""
    return [_rollout(m, 1.0, 1.0, 2 + m, masked=m) for m in (0, 1, 3, 7, 2, 2, 2, 2)]


@pytest.fixture
def common() -> dict[str, Any]:
    """Settings of a trainer on written rollouts."""
    rewards = [reported("right"), reported("form")]
    return {"rewards": rewards, "shuffle_dataset": False, "max_steps": 1, "max_grad_norm": 1e9}


@pytest.fixture
def counted() -> dict[str, Any]:
    """Options that read format and calls from written rollouts."""
    return {"format_reward": "form", "calls_field": "turns"}


@pytest.fixture
def scripted(build: Any, look: str, common: dict[str, Any], counted: dict[str, Any]) -> Run:
    """Trains on scripted rounds of 8 rows, two prompts of 4; gives the trainer and its rounds."""

    def run(
        *rounds: Any, options: dict[str, Any] | None = None, also: Any = (), **settings: Any
    ) -> tuple[Any, list[Any]]:
        given = {"rollout_func": Scripted(*rounds), **settings.pop("trainer", {})}
        defaults = {**common, "data": tiny_data(rows=2), "max_steps": len(rounds)}
        with trl_ext.enable({"hdpo": {**counted, **(options or {})}}, look, *also):
            trainer = build(trainer=given, **defaults | settings)
            trainer.train()
            return trainer, trainer._trl_ext.plugins["look"].rounds

    return run
