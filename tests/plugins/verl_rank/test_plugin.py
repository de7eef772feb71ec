"""VERL in rounds made by hand: processes that share rows, fill rows, states that are not finite, and warnings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trl_ext
from tests.engine.stages.ranks import Ranks, RankView
from trl_ext_hooks import UsageError
from trl_ext_hooks.basics import MetricLog
from trl_ext_plugins.verl_rank import VERLRank, prefix_ranks

LENGTHS = (7, 3, 9, 1, 8, 5)


def states(turn: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(turn)
    return [torch.randn(length, 4, generator=generator) for length in LENGTHS]


def rounds(view: Any, turn: int, rows: list[torch.Tensor], **more: Any) -> Any:
    """What the plugin reads of a round, on one process."""
    size = len(LENGTHS) // view.num_processes
    own = slice(view.process_index * size, (view.process_index + 1) * size)
    mask = torch.zeros(size, 9)
    for row, length in enumerate(LENGTHS[own]):
        mask[row, :length] = 1
    log = MetricLog("verl-rank")
    values: dict[str, Any] = {"mode": "train", "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0])}
    values |= {"loss_mask": mask, "local": own, "trainer": view, "log": log.add, "logged": log.values}
    values |= {"group_ids": torch.tensor([0, 0, 0, 1, 1, 1]), "hidden_states": {"verl-rank": torch.cat(rows[own])}}
    return SimpleNamespace(**values | more)


def run(view: Any, turns: int = 3, **more: Any) -> tuple[VERLRank, list[Any], list[Any]]:
    method = VERLRank(VERLRank.Options(stride=2))
    results, logs = [], []
    for turn in range(turns):
        round = rounds(view, turn, states(turn), **more)
        assert method.hidden_positions(round.loss_mask).sum() == round.loss_mask.sum()
        results.append(method.advantages(round))
        logs.append(round.logged)
    return method, results, logs


def test_processes_agree() -> None:
    whole, expected, one = Ranks(1).run(lambda rank: run(RankView(Ranks(1), rank)))[0]
    ranks = Ranks(2)
    shares = ranks.run(lambda rank: run(RankView(ranks, rank)))
    for method, results, _ in shares:
        assert results[0] is expected[0] is None
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[1:], expected[1:], strict=True))
        assert method.averages == whole.averages
    for turn, metrics in enumerate(one):
        for name, (total, count) in metrics.items():
            sums, counts = zip(*(logs[turn][name] for *_, logs in shares), strict=True)
            assert sum(sums) / sum(counts) == pytest.approx(total / count), name


def test_rows_that_fill_up_and_evaluation_leave_the_averages_alone() -> None:
    view = RankView(Ranks(1), 0)
    fill = torch.tensor([0, 0, 0, 1, 1, -1])
    short, *_ = run(view, group_ids=fill)
    full, *_ = run(view)
    assert short.averages != pytest.approx(full.averages)
    nothing, results, _ = run(view, mode="eval")
    assert nothing.averages is None and results == [None, None, None]


def test_the_first_step_is_recorded_and_not_shaped() -> None:
    view, own = RankView(Ranks(1), 0), states(0)
    method = VERLRank(VERLRank.Options(stride=2))
    method.hidden_positions((first := rounds(view, 0, own)).loss_mask)
    assert method.advantages(first) is None
    assert method.averages is not None
    before = list(method.averages)
    after = method.advantages(first)  # the same states again: an average row has no signal, others have
    assert after is not None and (after >= first.advantages).all() and (after > first.advantages).any()
    assert method.averages == pytest.approx(before)  # the mean of what they are


def test_ranks_are_shown_at_their_tokens() -> None:
    round = rounds(RankView(Ranks(1), 0), 0, states(0))
    round.loss_mask = torch.zeros(6, 12)
    for row, length in enumerate(LENGTHS):
        round.loss_mask[row, 1:4:2] = 1  # a tool wrote the token between
        round.loss_mask[row, 5 : length + 3] = 1
    round.loss_mask[3, 3] = 0  # one token
    round.loss_mask[1, 5:] = 0
    round.loss_mask[1, 6] = 1
    method = VERLRank(VERLRank.Options(stride=2, window=6))
    method.hidden_positions(round.loss_mask)
    method.advantages(round)
    curves = {curve.row: curve for curve in method.inspect(round).curves}
    assert 3 not in curves and curves[1].positions == [6]
    assert curves[0].positions == [6, 8]  # of the seven tokens 1, 3, 5 to 9, the third and the fifth of the last six
    assert curves[0].values == pytest.approx(prefix_ranks(states(0)[0][1:], 2).tolist())


def test_states_that_are_not_finite_stop_every_process() -> None:
    ranks = Ranks(2)

    def work(rank: int) -> None:
        broken = states(0)
        broken[4][2, 1] = torch.inf  # a row of the second process
        method, round = VERLRank(), rounds(RankView(ranks, rank), 0, broken)
        method.hidden_positions(round.loss_mask)
        method.advantages(round)

    for error in ranks.run(work):
        assert isinstance(error, UsageError) and "the training has diverged" in str(error)


def test_completions_that_are_too_short(build: Any) -> None:
    with trl_ext.enable("verl-rank"):
        (note,) = build()._trl_ext.plan.notes
    assert note.startswith("verl-rank: 8 tokens are too few") and "verl-rank.stride=40, which takes 121" in note
    with trl_ext.enable("verl-rank", verl_rank={"stride": 2}):
        assert not build()._trl_ext.plan.notes
