"""The record of a run is enough to repeat it, and holds no secret."""

import json
from pathlib import Path

import pytest

from tests.refusals import refused as refuses
from trl_ext import ConfigError
from trl_ext.cli import main
from trl_ext.support.versions import versions
from trl_ext.testing import metrics_of
from trl_ext.train import handover, repeat, summary
from trl_ext.train.launch import trl_launch

from .histories import finished, training


@pytest.fixture
def handed(monkeypatch):
    """`handed(*argv)` starts `trl_ext train` up to the launch, and returns the launcher and what workers would read."""
    caught = []

    def catch(args):
        caught.append((args, handover.read(Path(args.training_script_args[0]))))
        return 0

    monkeypatch.setattr(trl_launch, "launch", catch)

    def run(*argv):
        assert main.main(["train", *map(str, argv)]) == 0
        return caught.pop()

    return run


def test_a_record_makes_the_same_request(handed, config, tmp_path, capsys):
    """From a file, the command line, options of plugins, and accelerate in three spellings."""
    path = config(plugins={"gdpo": {"group_eps": 0.01}, "otc": None}, beta=0.04, num_processes=2, main_process_port=0)
    launcher, request = handed(
        *("--config", path, "--set", "gdpo.batch_norm=false", "--learning_rate", "1e-5", "--hub_token", "hf_x"),
        *("--reward_weights", "1", "0.5", "--cpu", "--mixed_precision=no", "--num-machines", "1"),
    )
    trainer, parsed = finished(tmp_path / "out", [training(1), training(2)])
    summary.write_summary(trainer, request, parsed, 1.0, "finished")
    text = (tmp_path / "out/trl_ext_run.json").read_text()
    assert "hf_x" not in text and "--hub_token '***'" in text
    content = json.loads(text)
    assert content["config"]["trainer"] == "grpo"
    assert content["config"]["plugins"] == {"gdpo": {"group_eps": 0.01, "batch_norm": False}, "otc": {}}
    assert content["config"]["learning_rate"] == 1e-5 and content["config"]["reward_weights"] == [1.0, 0.5]
    assert content["filled_in"] == {"use_cpu": True, "bf16": False}
    capsys.readouterr()
    again_launcher, again = handed("--config", tmp_path / "out/trl_ext_run.json", "--output_dir", tmp_path / "again")
    assert "the recorded run used" not in capsys.readouterr().err
    assert again.specs == request.specs and again.kind == request.kind and again.task == request.task
    asked, repeated = (content["config"] | {"output_dir": str(tmp_path / "again")}, again.config_to_repeat)
    assert {name: str(value) for name, value in repeated.items()} == {name: str(v) for name, v in asked.items()}
    for setting in ("num_processes", "cpu", "mixed_precision", "main_process_port", "num_machines", "multi_gpu"):
        assert getattr(again_launcher, setting) == getattr(launcher, setting), setting


def test_other_versions_are_told(tmp_path, capsys):
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"config": {"beta": 0.1}, "versions": versions() | {"trl": "1.11.0"}}))
    assert repeat.read_record(str(file)) == {"beta": 0.1}
    assert f"the recorded run used trl 1.11.0 (now {versions()['trl']})\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ["x.json is not valid JSON"]),
        ("[1]", ["x.json is JSON without the key `config`", "or a YAML file"]),
        ('{"plugins": []}', ["x.json is JSON without the key `config`"]),
    ],
)
def test_files_that_are_no_record(text, words, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with refuses(ConfigError, *words):
        repeat.read_record(str(file))


def test_tokens_are_hidden():
    command = ["trl_ext", "train", "--hub_token", "a", "--hub_token=b", "--hub_token", "--beta", "0.1", "c_token"]
    assert repeat.without_secrets(command) == [
        *("trl_ext", "train", "--hub_token", "***", "--hub_token=***", "--hub_token", "--beta", "0.1", "c_token")
    ]


@pytest.mark.slow
def test_a_repeated_run_has_the_same_numbers(script, config, tmp_path):
    path = config(plugins={"gdpo": {"batch_norm": False}})
    first = script("train", "--config", path, "--seed", "7", "--beta", "0.04")
    again = script("train", "--config", "out/trl_ext_run.json", "--output_dir", "again")
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    one, other = (json.loads((tmp_path / name / "trl_ext_run.json").read_text()) for name in ("out", "again"))
    histories = [metrics_of(_Ran(content["history"])) for content in (one, other)]
    assert histories[0] == histories[1] and len(histories[0]) > 2
    assert one["plugins"] == other["plugins"]


class _Ran:
    def __init__(self, history):
        self.state = self
        self.log_history = history
