"""Ctrl-C: a checkpoint at the end of a round, a record that says so, a command that goes on, and the same numbers."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from trl_ext.cli import main
from trl_ext.train import interrupt, output_folder, worker
from trl_ext.trl_internals import launch as trl_launch
from trl_ext.trl_internals.steps import ends_round

REWARDS = """
import os, signal

calls = 0


def pressing(completion_ids, **columns):
    global calls
    calls += 1
    if str(calls) == os.environ.get("PRESS_AT") and os.environ.get("RANK", "0") == os.environ.get("PRESS_RANK", "0"):
        os.kill(os.getpid(), signal.SIGINT)
    return [1.0 / (1 + len(ids) + ids[0] % 3) for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def listening():
    """Lets SIGINT be handled also where the tests were started with it ignored, as in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings of a run of four steps, in rounds of two, whose reward presses Ctrl-C in the call `PRESS_AT`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "rewards_that_press.py").write_text(REWARDS)
    monkeypatch.delitem(sys.modules, "rewards_that_press", raising=False)
    monkeypatch.delenv("TRL_EXT_FAILURES", raising=False)
    return {
        "reward_funcs": ["rewards_that_press.pressing"],
        "max_steps": 4,
        "steps_per_generation": 2,
        "use_cpu": True,
        "bf16": False,
    }


@pytest.fixture
def train(handed_over, monkeypatch, capsys):
    """`train(config, *argv, press=2)` runs the worker in this process: its exit code, and what it printed."""

    def run(path, *argv, press=0):
        monkeypatch.setenv("PRESS_AT", str(press))
        sys.modules.pop("rewards_that_press", None)
        code = worker.main([handed_over("--config", path, "--no_reward_check", *argv)])
        return code, capsys.readouterr()

    return run


def test_a_checkpoint_at_the_end_of_the_round_goes_on_with_the_same_numbers(train, config, settings, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    settings |= {"plugins": {"gdpo": {}}}
    assert train(config("whole.yaml", **settings | {"output_dir": str(whole)}))[0] == 0
    path = config("cut.yaml", **settings | {"output_dir": str(cut)})
    code, said = train(path, "--save_on_interrupt", press=1)
    # Ctrl-C came in step 1, and a round has two steps
    assert code == 130 and "step 2/4" in said.out and "step 3/4" not in said.out
    assert "saving checkpoint-2" in said.err
    record = output_folder.read_record(cut)
    assert (record["status"], record["steps"], record["max_steps"]) == ("interrupted", 2, 4)
    assert (cut / "checkpoint-2" / "trl_ext_state.pt").is_file() and not (cut / "model.safetensors").exists()

    code, said = train(path, "--resume_from_checkpoint", str(cut / "checkpoint-2"))
    assert code == 0 and "continuing after step 2" in said.out
    assert output_folder.read_record(cut)["status"] == "finished"
    same = load_file(cut / "model.safetensors")
    for name, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(value, same[name]), name


def test_without_the_option_the_run_ends_at_once(train, config, settings, tmp_path):
    code, said = train(config(**settings), press=2)
    assert code == 130 and "step 2/4" in said.out and "step 3/4" not in said.out
    assert output_folder.read_record(tmp_path / "out")["status"] == "interrupted"
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_ctrl_c_in_the_last_round_ends_a_finished_run(train, config, settings, tmp_path):
    assert train(config(**settings), "--save_on_interrupt", press=2)[0] == 0
    assert output_folder.read_record(tmp_path / "out")["status"] == "finished"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_overwriting_removes_the_old_run_when_training_begins(train, config, settings, tmp_path):
    old = tmp_path / "out" / "checkpoint-100"
    old.mkdir(parents=True)
    code, _ = train(config(**settings | {"max_steps": 1}), "--overwrite")
    assert code == 0 and not old.exists()


def test_the_end_of_a_round_counts_in_optimizer_steps():
    args = types.SimpleNamespace(num_iterations=2, steps_per_generation=6, gradient_accumulation_steps=4)
    assert [ends_round("grpo", args, step) for step in range(1, 7)] == [False, False, True, False, False, True]
    assert ends_round("dpo", args, 1)


def test_a_worker_listens_once_and_waits_if_it_shall():
    press = interrupt.Worker()
    with press.listening():
        press.waits = True
        os.kill(os.getpid(), signal.SIGINT)
        assert press.told
        press.waits = False
        os.kill(os.getpid(), signal.SIGINT)  # the parent repeats what the terminal sent
    with interrupt.Worker().listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupt.Worker().listening():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_second_ctrl_c_ends_the_children():
    lines = []
    press = interrupt.Parent(lines.append, "saving")
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with press.listening():
        child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
        child.stdout.readline()
        os.kill(os.getpid(), signal.SIGINT)
        assert child.poll() is None and lines == ["saving; Ctrl-C again leaves at once"]
        os.kill(os.getpid(), signal.SIGINT)
        assert child.wait(timeout=30) == -signal.SIGKILL
        child.stdout.close()


def test_the_parent_says_how_it_goes_on(config, tmp_path, monkeypatch, capsys):
    path = config(save_strategy="steps")

    def launched(args):
        out = tmp_path / "out"
        request = worker.handover.read(type(out)(args.training_script_args[0]))
        (out / "checkpoint-3").mkdir(parents=True)
        (out / "checkpoint-3" / "trainer_state.json").write_text("{}")
        record = {"status": "running", "started": request.started, "steps": 0, "max_steps": 9}
        (out / "trl_ext_run.json").write_text(json.dumps(record))
        return -2

    monkeypatch.setattr(trl_launch, "launch", launched)
    for name in ("TRL_EXT_FAILURES", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")
    argv = ["train", "--trainer", "grpo", "--config", path]
    assert main.main(argv) == 130
    checkpoint = tmp_path / "out" / "checkpoint-3"
    text = capsys.readouterr().err
    assert f"trl_ext: interrupted; saved: {checkpoint}" in text
    assert f"go on with: trl_ext {' '.join(argv)} --resume_from_checkpoint {checkpoint}" in text
    assert output_folder.read_record(tmp_path / "out")["status"] == "interrupted"
    # and the folder is not replaced by accident
    assert main.main(argv) == 2
    assert "holds a run of 0 steps" in capsys.readouterr().err


TWO = ("--num_processes", "2", "--cpu", "--main_process_port", "0")


@pytest.mark.slow
@pytest.mark.parametrize("option", [(), ("--save_on_interrupt",)])
def test_one_of_two_processes_is_told(script, config, settings, tmp_path, option):
    path = config(**settings | {"max_steps": 40})
    done = script("train", "--config", path, *TWO, *option, PRESS_AT="2", PRESS_RANK="1")
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert output_folder.read_record(tmp_path / "out")["status"] == "interrupted"
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == (["checkpoint-4"] if option else [])
    assert ("--resume_from_checkpoint" in done.stderr) == bool(option)
