"""Lines, table, record and picture of a run, on log histories as TRL writes them."""

import types

import pytest

from trl_ext.support import child_errors
from trl_ext.train import progress, summary


def training(step, good=0.0, reward=0.0, length=8.0):
    logs = {"loss": 0.1, "rewards/good/mean": good, "rewards/good/std": 0.5, "reward": reward}
    return logs | {"completions/mean_length": length, "step": step}


def evaluation(step, good):
    logs = {"eval_loss": 0.1, "eval_rewards/good/mean": good, "eval_reward": good}
    return logs | {"eval_completions/mean_length": 4.0, "step": step}


def test_held_out_evaluations_are_compared():
    found = summary.compare([evaluation(0, 0.1), training(1), evaluation(1, 0.5), training(2), evaluation(2, 0.9)])
    assert found.source == "held-out prompts, before training and after step 2"
    assert found.before["good"] == 0.1 and found.after["good"] == 0.9
    found = summary.compare([training(1), evaluation(1, 0.5), training(2), evaluation(2, 0.9)])
    assert "after step 1 and after step 2" in found.source


def test_without_evaluation_the_training_steps_are_compared_and_it_says_so():
    found = summary.compare([training(step, good=step / 10) for step in range(1, 11)])
    assert "first and the last 5 log entries (no held-out evaluation)" in found.source
    assert found.before["good"] == pytest.approx(0.3) and found.after["good"] == pytest.approx(0.8)
    assert summary.compare([training(1), evaluation(1, 0.5)]) is None
    odd = [training(1, good=float("nan")), training(2, good=1.0)]
    assert "good" not in summary.compare(odd).before and summary.compare(odd).after["good"] == 1.0


def finished(folder, history):
    """A trainer after its run, as far as the record reads it."""
    state = types.SimpleNamespace(log_history=history, global_step=2)
    accelerator = types.SimpleNamespace(num_processes=1, device="cpu")
    args = types.SimpleNamespace(output_dir=str(folder))
    return types.SimpleNamespace(state=state, accelerator=accelerator, args=args), (
        types.SimpleNamespace(dataset_name="data"),
        args,
        types.SimpleNamespace(model_name_or_path="model"),
        types.SimpleNamespace(datasets=[]),
    )


def test_what_a_run_leaves(tmp_path, capsys):
    from trl_ext.train.command_line import Request

    trainer, parsed = finished(tmp_path / "out", [training(1, 0.0), training(2, 1.0)])
    summary.report(trainer, Request({}, (), "grpo", None, {}, []), parsed, 3.0)
    assert "+1.000" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"trl_ext_run.json", "trl_ext_curves.png"}
    assert (tmp_path / "out/trl_ext_curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (75, "1:15"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


# --- errors of the workers, told by the parent ---


def fail(monkeypatch, folder, rank, error):
    monkeypatch.setenv("TRL_EXT_FAILURES", str(folder))
    monkeypatch.setenv("RANK", str(rank))
    return child_errors.record(error)


def test_what_all_workers_met_is_told_once(monkeypatch, tmp_path, capsys):
    from trl_ext import ConfigError

    assert [fail(monkeypatch, tmp_path, rank, ConfigError("the same thing")) for rank in range(3)] == [2, 2, 2]
    assert child_errors.tell(tmp_path, 1) == 2
    assert capsys.readouterr().err == "error: the same thing\n"


def test_other_errors_keep_their_traceback(monkeypatch, tmp_path, capsys):
    from trl_ext import ConfigError

    fail(monkeypatch, tmp_path, 0, ConfigError("ours"))
    try:
        raise ValueError("not ours")
    except ValueError as error:
        assert fail(monkeypatch, tmp_path, 1, error) == 1
    assert child_errors.tell(tmp_path, 1) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ours\nTraceback") and text.endswith("error: ValueError: not ours\n")


def test_a_process_that_was_killed(tmp_path, capsys):
    assert child_errors.tell(tmp_path, -9) == 1
    assert "ended by SIGKILL, which the system sends when memory runs out" in capsys.readouterr().err
    assert child_errors.tell(tmp_path, 3) == 1
    assert "exit code 3" in capsys.readouterr().err
    assert child_errors.tell(tmp_path, 0) == 0
