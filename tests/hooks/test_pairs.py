"""Pairs with log-probabilities: what is summed over the tokens of a completion."""

from __future__ import annotations

from typing import Any

import torch

from trl_ext_hooks import ScoredPairs


def made(reference: torch.Tensor | None, **batch: Any) -> ScoredPairs:
    trainer: Any = None
    policy = torch.tensor([[-1.0, -2.0], [0.0, -0.5], [-3.0, 0.0], [0.0, 0.0]])
    return ScoredPairs("train", 0, trainer, batch, [{}, {}], {}, policy, reference)


def test_log_ratios_of_completions() -> None:
    reference = torch.tensor([[-0.5, -2.0], [0.0, -1.5], [-1.0, 0.0], [0.0, 0.0]])
    assert made(reference).sequence_log_ratios.tolist() == [-0.5, 1.0, -2.0, 0.0]


def test_log_ratios_where_only_sums_of_the_reference_are_known() -> None:
    pairs = made(None, ref_chosen_logps=torch.tensor([-2.5, -1.5]), ref_rejected_logps=torch.tensor([-1.0, 0.0]))
    assert pairs.sequence_log_ratios.tolist() == [-0.5, 1.0, -2.0, 0.0]
