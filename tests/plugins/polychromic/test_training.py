"""Polychromic in real trainers: its advantages and metrics, its limit, what is inspected, and two processes."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import trl_ext
from tests.known_rows import Known, assert_same_training, logged, moved
from trl_ext.testing import conformance, tiny_data
from trl_ext_hooks.toolkit.groups import label_ids
from trl_ext_plugins.polychromic import polychromic_advantages, set_scores

SEEN: dict[str, Any] = {}


def by_length(completions: list[Any], completion_ids: list[list[int]], answer: list[str], **columns: Any) -> list[Any]:
    """The number of tokens, and no strategy for the longest ones."""
    SEEN.update(columns, completions=completions, answer=answer)
    return [None if len(ids) > 5 else len(ids) for ids in completion_ids]


def all_alike(completions: list[Any], **columns: Any) -> list[int]:
    return [0] * len(completions)


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("strategies_of_a_test")
    module.by_length, module.all_alike = by_length, all_alike  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def options(set_size: int, name: str = "by_length") -> dict[str, Any]:
    return {"polychromic": {"strategy": f"strategies_of_a_test.{name}", "set_size": set_size}}


COMMON: dict[str, Any] = {"data": tiny_data(rows=2), "shuffle_dataset": False, "optim": "sgd", "learning_rate": 0.1}
COMMON |= {"beta": 0.0}


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_two_steps_with_its_advantages(kind: str, train: Any, plugin: Any, look: str) -> None:
    with trl_ext.enable(options(3), plugin(Known), look):
        trainer = train(kind, **COMMON)
        own = trainer._trl_ext.plugins["polychromic"]
        rounds = trainer._trl_ext.plugins["look"].rounds
    assert len(rounds) == 2
    for step, round in enumerate(rounds):
        names = [None if len(ids) > 5 else len(ids) for ids in round.completion_ids]
        scores = set_scores(round.total_reward, label_ids(names), round.group_ids, 3)
        expected = polychromic_advantages(round.total_reward, scores)
        torch.testing.assert_close(round.advantages.double(), expected, atol=1e-7, rtol=0)
        assert round.advantages.abs().max() > 0.01
        kinds = sum(len(set(names[start : start + 4]) - {None}) for start in (0, 4))
        assert logged(trainer, "polychromic/strategies")[step] == pytest.approx(kinds / 2)
        assert logged(trainer, "polychromic/set_score")[step] == pytest.approx(scores.all_sets.mean().item(), abs=1e-6)
        assert logged(trainer, "polychromic/unnamed")[step] == pytest.approx(names.count(None) / 8)
        assert 0 < names.count(None) < 8
    assert SEEN["answer"] == [row["answer"] for row in rounds[-1].rows] and "index" in SEEN
    spans = own.inspect(rounds[-1]).spans
    assert [(span.row, span.end, span.label) for span in spans] == [
        (row, len(ids), f"strategy {len(ids)}") for row, ids in enumerate(rounds[-1].completion_ids) if len(ids) <= 5
    ]
    assert [span.value for span in spans] == pytest.approx([scores.own_sets[span.row].item() for span in spans])


def test_sets_of_one_train_as_grpo_without_scaling(train: Any, plugin: Any) -> None:
    runs = []
    for names, scaling in (({}, "none"), (options(1, "all_alike"), "group"), (options(3), "group")):
        with trl_ext.enable(names, plugin(Known)):
            runs.append(train(scale_rewards=scaling, **COMMON))
    plain, limit, sets = runs
    assert_same_training(plain, limit, 1e-6)
    assert moved(plain, sets) > 1e-4


@pytest.mark.slow
def test_one_and_two_processes_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second one the middle group lies on both."""
    (tmp_path / "strategies_in_a_file.py").write_text(
        "def by_length(completion_ids, **columns):\n    return [len(ids) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    chosen = {"strategy": "strategies_in_a_file.by_length", "set_size": 2}
    checks = conformance("polychromic", tmp_path / "runs", chosen, kinds=("grpo",), processes=2)
    assert not [check for check in checks if not check.passed]
    assert any("2 processes" in check.name for check in checks)
