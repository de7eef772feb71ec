"""Rewards of a run that a plugin owns: sums of weighted reward functions."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest

from tests.refusals import refused
from trl_ext import ConfigError
from trl_ext.campaign.job import LocalJob


class Alone:
    """What `LocalJob.rewards` uses of a job."""

    def _tokenizer(self) -> Any:
        return lambda text, **settings: {"input_ids": list(text.encode())}


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    module = types.ModuleType("rewards_of_a_job")
    module.logs = lambda completions, **kwargs: [  # type: ignore[attr-defined]
        math.log(len(text)) if text else -math.inf for text in completions
    ]
    module.some = lambda completions, **kwargs: [None, math.nan, 2.0][: len(completions)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return [f"{module.__name__}.logs", f"{module.__name__}.some"]


def test_rewards_that_do_not_apply_are_left_out(functions: list[str]) -> None:
    rows = [{"prompt": "p"}] * 3
    score = LocalJob.rewards(Alone(), functions, [2.0, 1.0])  # type: ignore[arg-type]
    assert score(rows, ["a", "ab", "a"]) == pytest.approx([0, 2 * math.log(2), 2])


def test_an_infinite_reward_names_its_function(functions: list[str]) -> None:
    score = LocalJob.rewards(Alone(), functions)  # type: ignore[arg-type]
    with refused(ConfigError, "reward function 'rewards_of_a_job.logs' returned -inf for 1 of 2 completions."):
        score([{"prompt": "p"}] * 2, ["a", ""])
