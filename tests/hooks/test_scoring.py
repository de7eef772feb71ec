"""Rewards by name, the weighted sum of a row, and lengths of a round."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch

from trl_ext_hooks import Round, UsageError

NAN = math.nan


def made(rewards: list[list[float]], weights: list[float], **more: Any) -> Round:
    rows = len(rewards)
    values: dict[str, Any] = {
        "mode": "train",
        "step": 0,
        "num_generations": 1,
        "rows": [{}] * rows,
        "prompts": [""] * rows,
        "completions": [""] * rows,
        "completion_ids": [[1]] * rows,
        "tool_mask": None,
        "group_ids": torch.arange(rows),
        "offset": 0,
        "trainer": types.SimpleNamespace(gather=lambda tensor: torch.cat([tensor, tensor])),
        "fields": {},
        "gathered": {},
        "rewards": torch.tensor(rewards),
        "reward_names": ("right", "form", "short")[: len(weights)],
        "reward_weights": torch.tensor(weights),
        "advantages": torch.zeros(rows),
        "batch": {"completion_mask": torch.tensor([[1, 1, 1]] * rows), "tool_mask": torch.tensor([[1, 0, 1]] * rows)},
    }
    return Round(**values | more)


def test_the_total_is_a_loop_in_double_precision() -> None:
    rewards = [[1.0, 0.1, 3.0], [NAN, 0.7, NAN], [NAN, NAN, NAN], [0.0, -2.0, 0.3]]
    weights = [1.0, 0.3, -0.5]
    round = made(rewards, weights)
    exact, factors = round.rewards.double().tolist(), round.reward_weights.double().tolist()
    expected = [sum(w * r for w, r in zip(factors, row, strict=True) if not math.isnan(r)) for row in exact]
    assert round.total_reward.dtype == torch.float64
    assert round.total_reward[[0, 1, 3]].tolist() == pytest.approx([expected[0], expected[1], expected[3]], abs=1e-15)
    assert torch.isnan(round.total_reward[2])  # a row to which nothing applies has no reward, not one of 0


def test_a_reward_of_weight_0_still_applies() -> None:
    assert made([[5.0], [NAN]], [0.0]).total_reward[0].item() == 0.0


def test_rewards_by_name() -> None:
    round = made([[1.0, 2.0], [3.0, 4.0]], [1.0, 1.0])
    assert round.reward("form").tolist() == [2.0, 4.0] and round.reward_index("form") == 1
    for first in (None, ""):
        assert round.reward(first).tolist() == [1.0, 3.0]


def test_a_reward_that_is_gone() -> None:
    with pytest.raises(UsageError, match="no reward is called 'fomr' here; the round has right, form"):
        made([[1.0, 2.0]], [1.0, 1.0]).reward("fomr")


def test_lengths_that_the_core_did_not_gather_are_gathered() -> None:
    assert made([[1.0]], [1.0]).lengths.tolist() == [2, 2]
    assert made([[1.0]], [1.0], gathered_lengths=torch.tensor([7, 9])).lengths.tolist() == [7, 9]


def test_micro_batches_of_a_round_are_those_of_all_processes() -> None:
    args = types.SimpleNamespace(steps_per_generation=3)
    trainer = types.SimpleNamespace(args=args, num_processes=2)
    assert made([[1.0]], [1.0], trainer=trainer).micro_batches == 6
    assert made([[1.0]], [1.0], trainer=trainer, mode="eval").micro_batches == 2
