"""`trl_ext bench`: small runs of the real measurements."""

import argparse
import importlib.util
import json
import statistics
from typing import get_args

import pytest

from trl_ext import OptionError
from trl_ext.bench import overhead, probes, shared_prefix
from trl_ext.bench.turns import step_times
from trl_ext.cli import bench


def run(*argv):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))


@pytest.mark.slow
def test_shared_prefix_reports_every_figure(model, tmp_path, capsys):
    picture = tmp_path / "speed.png"
    shapes = ["--shape", "24x3x8", "--shape", "40x4x8"]
    assert (
        run("shared-prefix", "--model", model, *shapes, "--repeats", "1", "--trainer", "--json", "--plot", str(picture))
        == 0
    )
    first, second = json.loads(capsys.readouterr().out)
    assert (first["prompt_length"], first["group_size"], first["completion_length"]) == (24, 3, 8)
    # the last completion token predicts nothing, so it is not packed
    assert first["token_ratio"] == pytest.approx(3 * 32 / (24 + 3 * 7))
    assert second["token_ratio"] == pytest.approx(4 * 48 / (40 + 4 * 7))
    for found in (first, second):
        assert found["speedup"] == pytest.approx(found["seconds_dense"] / found["seconds_shared"])
        assert found["max_logprob_diff"] < 5e-6 and 0 < found["rel_grad_diff"] < 1e-5
        assert found["flop_ratio"] > 1 and found["speedup_trainer"] > 0
        assert found["peak_memory_ratio"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_shared_prefix_prints_a_table(model, capsys):
    assert run("shared-prefix", "--model", model, "--shape", "24x3x8", "--repeats", "1") == 0
    shown = capsys.readouterr().out
    assert "24 x 3 x 8" in shown and "2.13" in shown and "Ratios are dense by shared" in shown


def test_a_shape_that_is_none_is_refused():
    with pytest.raises(
        OptionError, match=r"--shape: a shape is PROMPTxGROUPxCOMPLETION, such as 1024x8x64; got '24x3'"
    ):
        run("shared-prefix", "--shape", "24x3")


def test_overhead_compares_every_arm_with_plain_trl(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "ARMS", {"plain TRL": None, "gdpo": "gdpo"})
    assert run("overhead", "--steps", "2", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(overhead.ARMS)
    assert rows[0]["ratio"] == 1 and rows[0]["ratio_low"] == rows[0]["ratio_high"] == 1
    for row in rows:
        assert row["seconds"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_probes_are_compared_with_and_without_the_tree(capsys, monkeypatch):
    plain, shared, alone = list(probes.ARMS)[:3]  # the other two draw answers, which is tested with the probes
    monkeypatch.setattr(probes, "ARMS", {name: probes.ARMS[name] for name in (plain, shared, alone)})
    assert run("probes", "--steps", "1", "--length", "64", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == [plain, shared, alone] and rows[plain]["share"] == 0
    assert rows[shared]["token_ratio"] > 1.5 > 1.01 > rows[alone]["token_ratio"] > 0.5  # padding
    assert rows[shared]["seconds"] > 0 and rows[shared]["share"] < 1


def test_the_interval_of_a_median():
    assert overhead.interval([2.0] * 9) == (2.0, 2.0)
    values = [float(i) for i in range(101)]
    low, high = overhead.interval(values)
    assert low < statistics.median(values) < high
    # the order statistics of a binomial: 50 -+ 1.96 * sqrt(101) / 2
    assert low == pytest.approx(40, abs=2) and high == pytest.approx(60, abs=2)


def test_trainers_take_turns(build):
    seen = []
    trainers = {name: build("grpo", max_steps=3) for name in ("a", "b")}
    ticks = iter(range(1000))

    def clock():
        seen.append(next(ticks))
        return float(seen[-1])

    times = step_times(trainers, clock=clock)
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}, "a step of one trainer was interrupted by another"


@pytest.mark.skipif(importlib.util.find_spec("prefix_grouper") is None, reason="PrefixGrouper is not installed")
def test_every_form_of_prefix_grouper_is_exact():
    """Otherwise its speed would be compared with a wrong result."""
    model, shape = shared_prefix.default_model(), (24, 3, 8)
    shared_prefix.add_fused_head(model)
    ids, mask = shared_prefix._batch(model, shape)
    dense = shared_prefix._dense(model, ids, mask, 8)
    for form in get_args(shared_prefix.Form):
        grouped = shared_prefix._prefix_grouper(model, ids, shape, form)
        assert (grouped - dense).abs().max() < 5e-6


def test_peak_memory_counts_what_is_held_at_once():
    import torch

    def hold():
        kept = torch.ones(1 << 20)
        del kept
        return torch.ones(1 << 19)

    peak = shared_prefix._peak_bytes(hold)
    assert (1 << 22) <= peak < (1 << 22) + (1 << 21)
