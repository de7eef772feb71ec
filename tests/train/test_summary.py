"""The table and the record of a run, from log histories as TRL writes them."""

import pytest

from trl_ext.train import summary
from trl_ext.train.command_line import Request

from .histories import evaluation, finished, training


def test_held_out_evaluations_are_compared():
    found = summary.before_and_after(
        [evaluation(0, 0.1), training(1), evaluation(1, 0.5), training(2), evaluation(2, 0.9)]
    )
    assert found.source == "held-out prompts, before training and after step 2"
    assert found.before["good"] == 0.1 and found.after["good"] == 0.9
    found = summary.before_and_after([training(1), evaluation(1, 0.5), training(2), evaluation(2, 0.9)])
    assert "after step 1 and after step 2" in found.source


def test_without_evaluation_the_training_steps_are_compared_and_it_says_so():
    found = summary.before_and_after([training(step, good=step / 10) for step in range(1, 11)])
    assert "first and the last 5 log entries (no held-out evaluation)" in found.source
    assert found.before["good"] == pytest.approx(0.3) and found.after["good"] == pytest.approx(0.8)
    assert summary.before_and_after([training(1), evaluation(1, 0.5)]) is None
    odd = [training(1, good=float("nan")), training(2, good=1.0)]
    assert "good" not in summary.before_and_after(odd).before and summary.before_and_after(odd).after["good"] == 1.0


def test_what_a_run_leaves(tmp_path, capsys):
    trainer, parsed = finished(tmp_path / "out", [training(1, 0.0), training(2, 1.0)])
    summary.write_summary(trainer, Request({}, (), "grpo", None, {}, []), parsed, 3.0, "finished")
    out = capsys.readouterr().out
    assert "+1.000" in out and "2 steps in 3 s" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"trl_ext_run.json", "trl_ext_curves.png"}
    assert (tmp_path / "out/trl_ext_curves.png").read_bytes().startswith(b"\x89PNG")
