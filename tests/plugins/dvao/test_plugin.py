"""DVAO in a real trainer: its advantages, its metrics, and what is refused before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_ext
from tests.refusals import refused
from trl_ext_plugins.dvao import dvao_advantages


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_run_trains_on_its_advantages(kind: str, train: Any, look: str) -> None:
    settings = {"beta": 0.0} if kind == "rloo" else {}
    with trl_ext.enable("dvao", look, dvao={"eps": 0.01}):
        trainer = train(kind, max_steps=1, reward_weights=[1.0, 2.0], **settings)
        (round,) = trainer._trl_ext.plugins["look"].rounds
    expected = dvao_advantages(round.rewards, torch.tensor([1.0, 2.0]), round.group_ids, eps=0.01)
    torch.testing.assert_close(round.advantages, expected)
    assert round.advantages.abs().max() > 0.1
    logs = trainer.state.log_history[0]
    assert 0 < logs["dvao/weight/digits"] + logs["dvao/weight/brevity"] < 1


def test_wrong_weights_are_refused(build: Any) -> None:
    with trl_ext.enable("dvao"):
        with refused(trl_ext.ConfigError, "dvao: reward_weights=[1.0, -1.0] must not be negative", "Turn the reward"):
            build(reward_weights=[1.0, -1.0])
        with refused(trl_ext.ConfigError, "and one must be above 0"):
            build(reward_weights=[0.0, 0.0])
        trainer = build()
        assert "the paper uses 16" in trainer._trl_ext.plan.notes[0]
