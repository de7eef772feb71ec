"""A run written as YAML, and the same run read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from trl_ext.cli import main
from trl_ext.train import command_line
from trl_ext.trl_internals import arguments
from trl_ext.trl_internals import launch as trl_launch


def asked(*argv: str) -> tuple[Any, ...]:
    """Everything of a run that was asked for, wherever it stood: our request, TRL's arguments, the launcher's."""
    args, rest = command_line.Parser().parse_known_args([*argv])
    request = command_line.understand(args, rest)
    divided = trl_launch.split(request.kind, request.arguments, request.settings)
    of_trl = {name: value for name, value in request.settings.items() if name in divided.given}
    parsed = arguments.parse(request.kind, divided.trl, of_trl)
    values = [vars(group) if index != 1 else group.to_dict() for index, group in enumerate(parsed)]
    launcher = trl_launch.launch_arguments(request.kind, divided.launch, [], ())
    same = dataclasses.replace(request, config=None, settings={}, arguments=[])
    return same, set(divided.given), values, vars(launcher)


def test_a_written_run_is_the_same_run(config: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("TRL_EXT_TEST_VARIABLE", "before")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from trl_ext_hooks import Plugin, option\n"
        "class Mine(Plugin):\n"
        "    name, trainers = 'mine', ('grpo', 'rloo')\n"
        "    @dataclass(frozen=True)\n"
        "    class Options:\n"
        "        words: list[str] = option([], help='words')\n"
    )
    file = config(
        plugins={"shared-prefix": {}},
        env={"TRL_EXT_TEST_VARIABLE": 3},
        experiment={"seeds": 3},
        use_cpu=True,
        bf16=False,
        lr_scheduler_kwargs={"num_cycles": 2},
        num_processes=2,
    )
    typed = ["--plugin", str(tmp_path / "mine.py"), "--set", "mine.words=[a, b]", "--trainer", "rloo"]
    typed += ["--learning_rate", "1e-6", "--report_to", "none", "--debug", "underflow_overflow", "--beta", "0.05"]
    typed += ["--model_init_kwargs", '{"dtype": "float32"}', "--no_gradient_checkpointing", "--use_peft"]
    typed += ["--accelerate_config", "multi_gpu", "--cpu", "--main_process_port=0", "--inspect", "2", "--no_save"]
    written = tmp_path / "whole.yaml"
    assert main.main(["train", "--config", file, *typed, "--write_config", str(written)]) == 0
    content = yaml.safe_load(written.read_text())
    assert content["trainer"] == "rloo" and content["inspect"] == 2 and content["no_save"] is True
    assert content["gradient_checkpointing"] is False and content["cpu"] is True
    assert content["env"] == {"TRL_EXT_TEST_VARIABLE": "3"} and content["experiment"] == {"seeds": 3}
    assert "warmup_steps" not in content  # nobody asked for it
    assert asked("--config", str(written)) == asked("--config", file, *typed)
    assert asked("--config", str(written)) != asked("--config", str(written), "--seed", "7")
    # what it says in its first lines is the command that reads it
    assert f"trl_ext train --config {written}" in written.read_text()
    assert main.main(["train", "--config", file, "--write_config", str(written)]) == 2
    assert "the file exists. Name another one, or remove it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--write_config", "no/where.yaml"], "there is no folder 'no'"),
        (["--learning_rat", "1", "--write_config", "x.yaml"], "has an option --learning_rat"),
    ],
)
def test_nothing_is_written(argv: list[str], words: str, refused: Any, config: Any, tmp_path: Path) -> None:
    assert words in refused("train", "--config", config(), *argv)
    assert not Path("x.yaml").exists()
