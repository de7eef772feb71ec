"""The embedded default: its task, its files, its settings; and, marked slow, a real run of it."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import yaml

from trl_ext.cli import main
from trl_ext.train import demo, handover, worker
from trl_ext.train.demo import model as demo_model
from trl_ext.train.demo import task
from trl_ext.trl_internals import launch


def say(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_rewards():
    replies = say("3 + 4 = 7", " 9 - 2 = 7. ", "4 + 3 is 7", "7 or 8", "", "-7", "Seven")
    assert task.correctness(replies, answer=["7"] * 7) == [1, 1, 1, 0, 0, 0, 0]
    assert task.format(replies, answer=["7"] * 7) == [1, 1, 0, 0, 0, 0, 0]
    assert task.correctness(["so -7"], answer=["-7"]) == [1]


def test_questions_are_distinct_right_and_always_the_same():
    train, test = task.questions()
    assert (train, test) == task.questions() and len(test) == task.HELD_OUT and len(train) > 100
    texts = [row["prompt"][0]["content"] for row in train + test]
    assert len(set(texts)) == len(texts)
    for row in train + test:
        assert eval(row["prompt"][0]["content"].split(" = ")[0]) == int(row["answer"])


def test_the_folder_is_written_once_by_many(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    told = []
    threads = [threading.Thread(target=task.folder, args=(told.append,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [f"arithmetic-{task.VERSION}"]
    assert task.folder(told.append).is_dir()
    rows = [json.loads(line) for line in (task.folder() / "test.jsonl").read_text().splitlines()]
    assert rows == task.questions()[1]


def test_conversion_happens_once_and_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    weights = tmp_path / "small.gguf"
    weights.write_bytes(b"GGUF")
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "weights", lambda: weights)
    with pytest.raises(Exception, match=r"."):
        demo_model.folder(print)  # not a model at all
    assert not [entry for entry in (tmp_path / "cache").glob("*/*") if entry.is_dir()]
    made = []

    def convert(source, folder):
        made.append(folder.parent)

    monkeypatch.setattr(demo_model, "_convert", convert)
    threads = [threading.Thread(target=demo_model.folder, args=(lambda line: None,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and demo_model.folder().parent == made[0] and demo_model.folder().is_dir()


def test_every_setting_is_trls_and_gives_way_to_the_users(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model, "folder", lambda say: tmp_path / "model")
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    launched = []
    monkeypatch.setattr(
        launch, "launch", lambda args: launched.append(handover.read(Path(args.training_script_args[0]))) or 0
    )
    for name in ("TRL_EXT_FAILURES", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"max_steps": 3, "plugins": {"gdpo": None}}))
    assert main.main(["train", "--config", str(file), "--learning_rate", "0.5"]) == 0
    (request,) = launched
    assert [spec.name for spec in request.specs] == ["gdpo"] and request.command.startswith("trl_ext train --config")
    divided = launch.split("grpo", request.arguments, {})
    assert not divided.launch
    assert divided.given["learning_rate"] == 0.5 and "max_steps" not in divided.given  # the file has it
    assert divided.given["output_dir"] == "runs/demo-gdpo" and divided.given["lora_r"] == 16
    assert main.main(["train", "--config", str(file), "--no_save", "--save_strategy", "steps"]) == 0
    assert launch.split("grpo", launched[1].arguments, {}).given["save_strategy"] == "no"
    for kind in ("grpo", "rloo"):
        launch.split(kind, [], demo.settings([]))


def test_it_goes_on_after_ctrl_c_with_the_command_that_it_prints(model, tmp_path, monkeypatch, capsys):
    """The settings of the demo on a tiny model, with both processes in this one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(demo_model, "folder", lambda say: model)
    monkeypatch.setattr(launch, "launch", lambda args: worker.main(args.training_script_args))
    monkeypatch.chdir(tmp_path)
    for name, value in {"TRL_EXT_CACHE": str(tmp_path), "TRL_EXT_FAILURES": "", "ACCELERATE_USE_CPU": ""}.items():
        monkeypatch.setenv(name, value)
    rounds = []

    def format(completions, **columns):
        rounds.append(len(completions))
        if len(rounds) == 4:  # two batches of evaluation, then the second step
            os.kill(os.getpid(), signal.SIGINT)
        return [float(len(completion[0]["content"])) for completion in completions]

    monkeypatch.setattr(task, "format", format)
    argv = ["train", "--plugin", "gdpo", "--max_steps", "3", "--no_reward_check"]
    try:
        assert main.main([*argv, "--save_on_interrupt"]) == 130
        (told,) = [line for line in capsys.readouterr().err.splitlines() if "go on with: " in line]
        command = told.partition("go on with: ")[2].split()
        assert command[-1] == "runs/demo-gdpo/checkpoint-2"
        assert main.main(command[1:]) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert "continuing after step 2" in capsys.readouterr().out
    record = json.loads(Path("runs/demo-gdpo/trl_ext_run.json").read_text())
    assert (record["status"], record["steps"]) == ("finished", 3)
    assert [path.name for path in Path("runs/demo-gdpo").glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.mark.slow
def test_the_embedded_default_trains(script, tmp_path):
    """The whole run of the real model: the files are there, and the format is learnt without losing correctness."""
    done = script("train", "--plugin", "gdpo", TRL_EXT_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "training the embedded SmolLM2-135M-Instruct" in done.stderr
    record = json.loads((tmp_path / "runs/demo-gdpo/trl_ext_run.json").read_text())
    assert record["hooks_fired"]["gdpo"]["advantages"] == 25 + 4  # and two held-out evaluations of two batches each
    comparison = record["comparison"]
    assert comparison["source"].startswith("held-out prompts, before training")
    assert comparison["after"]["format"] > comparison["before"]["format"] + 0.3
    assert comparison["after"]["correctness"] > comparison["before"]["correctness"]
    assert (tmp_path / "runs/demo-gdpo/adapter_config.json").is_file()
