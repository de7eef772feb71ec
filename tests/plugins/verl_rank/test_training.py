"""VERL in a real trainer: shaped advantages from the policy's own states, a resume, and the base without a bonus."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from trl_ext_plugins.verl_rank import rank_signal, shaped

SETTINGS = {"max_completion_length": 10, "max_steps": 3, "save_strategy": "steps", "save_steps": 1}


def measured(round: Any, stride: int) -> torch.Tensor:
    """Rank, velocity and acceleration of every row, from a forward of the policy and singular values of its states."""
    rows = []
    for states in round.hidden_states["verl-rank"].double().split(round.loss_mask.sum(1).int().tolist()):
        ranks = {}
        for end in (*range(stride + 1, len(states) + 1, stride), len(states)):
            values = torch.linalg.svdvals(states[:end] - states[:end].mean(0))
            ranks[end] = torch.special.entr(values / values.sum()).sum().exp().item() if end > 1 else 0.0
        path = [ranks[end] for end in range(stride + 1, len(states) + 1, stride)]
        speed = [rank - sum(path[:place]) / place for place, rank in enumerate(path) if place]
        turn = [after - before for before, after in itertools.pairwise(speed)]
        rows.append([ranks[len(states)], *(sum(values) / max(len(values), 1) for values in (speed, turn))])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_run_trains_on_its_advantages(kind: str, train: Any, build: Any, look: str) -> None:
    settings = {**SETTINGS, "beta": 0.0}
    with trl_ext.enable("verl-rank", look, verl_rank={"stride": 2}):
        trainer = train(kind, **settings)
        rounds = trainer._trl_ext.plugins["look"].rounds
        averages = trainer._trl_ext.plugins["verl-rank"].averages
        resumed = build(kind, **settings)
        checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed._trl_ext.plugins["verl-rank"].averages == averages
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name])
    logs = trainer.state.log_history
    assert "verl-rank/signal" not in logs[0] and 0 < logs[1]["verl-rank/raised"] <= 1
    first = measured(rounds[0], 2)
    assert logs[0]["verl-rank/rank"] == pytest.approx(first[:, 0].mean().item(), rel=1e-4)
    now = measured(rounds[1], 2)
    base = _base(kind, rounds[1])
    expected = shaped(base, rank_signal(now, first.mean(0))[1])
    torch.testing.assert_close(rounds[1].advantages.double(), expected, atol=1e-4, rtol=1e-3)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(rounds[0].advantages.double(), _base(kind, rounds[0]), atol=1e-5, rtol=1e-5)


def _base(kind: str, round: Any) -> torch.Tensor:
    """TRL's advantages of groups of four."""
    groups = round.rewards.double().sum(1).view(-1, 4)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if kind == "grpo" else centred * 4 / 3).flatten()


def test_without_a_bonus_it_is_grpo(train: Any) -> None:
    settings = {"num_iterations": 2, "max_steps": 4}  # where TRL computes old log-probabilities itself
    plain = train(**settings)
    with trl_ext.enable("verl-rank", verl_rank={"stride": 2, "weight": 0.0}):
        neutral = train(**settings)
    with trl_ext.enable("verl-rank", verl_rank={"stride": 2}):
        shaping = train(**settings)
    same = [torch.equal(a, b) for a, b in zip(plain.model.parameters(), neutral.model.parameters(), strict=True)]
    moves = [(a - b).abs().max() for a, b in zip(plain.model.parameters(), shaping.model.parameters(), strict=True)]
    assert all(same) and max(moves) > 1e-4
