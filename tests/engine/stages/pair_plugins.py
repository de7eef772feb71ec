"""Plugins on pairs, data and comparisons that the tests of DPO share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset

from trl_ext.testing import metrics_of, tiny_data
from trl_ext.trl_internals import seams
from trl_ext_hooks import PairLogps, Plugin, hookimpl

FUSED = seams.trl_version() >= seams.Version("1.15")
needs_fused = pytest.mark.skipif(not FUSED, reason="needs the fused head of TRL 1.15")


def ragged(rows: int = 16) -> Dataset:
    """Pairs of unequal lengths, with a number per pair and per completion token."""
    data = tiny_data("dpo", rows)
    chosen = [[{"role": "assistant", "content": "1234567"[: 1 + i % 6]}] for i in range(rows)]
    return data.remove_columns("chosen").add_column("chosen", chosen).add_column("number", list(range(rows)))


class Times(Plugin):
    """Multiplies all log-probabilities by a number per pair."""

    name = "times"
    trainers = ("dpo",)
    needs = ("column:number",)
    fields = ("weight",)
    factor = 1.0

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.seen: list[Any] = []

    @hookimpl
    def pair_batch(self, pairs: Any) -> dict[str, Any]:
        assert set(pairs.batch) == {"input_ids", "attention_mask", "completion_mask"}
        for row, ids, mask in zip(pairs.rows, pairs.batch["input_ids"], pairs.batch["attention_mask"], strict=False):
            assert ids[mask.bool()].tolist() == row["prompt_ids"] + row["chosen_ids"]
        self.seen.append((pairs.mode, pairs.step, [row["number"] for row in pairs.rows]))
        return {"weight": self.factor * torch.ones(len(pairs.rows))}

    @hookimpl
    def pair_logps(self, pairs: Any) -> PairLogps:
        assert pairs.per_token_logps.requires_grad == (pairs.mode == "train")
        assert not pairs.ref_per_token_logps.requires_grad
        weight = pairs.fields["weight"].repeat(2).unsqueeze(1)
        return PairLogps(weight * pairs.per_token_logps, weight * pairs.ref_per_token_logps)

    @hookimpl
    def pair_metrics(self, pairs: Any) -> dict[str, tuple[float, float]]:
        assert not pairs.per_token_logps.requires_grad
        return {"logp": (pairs.per_token_logps.sum().item(), len(pairs.rows))}


class Twice(Times):
    name = "twice"
    factor = 2.0


def same(left: Any, right: Any, ignore: str = "-") -> None:
    for (name, a), b in zip(left.model.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(metrics_of(left), metrics_of(right), strict=True):
        for key, value in a.items():
            assert b[key] == value or (value != value and b[key] != b[key]) or key.startswith(ignore), key
