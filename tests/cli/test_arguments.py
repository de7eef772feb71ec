"""How a command line is divided between trl_ext, TRL and accelerate, and what the worker makes of its part."""

import json
import os

import pytest

from trl_ext import ConfigError
from trl_ext.cli import train
from trl_ext.train import command_line
from trl_ext.trl_internals import arguments
from trl_ext.trl_internals import launch as trl_launch


def understood(*argv):
    args, rest = command_line.Parser().parse_known_args([*map(str, argv)])
    return args, command_line.understand(args, rest)


def test_plugins_come_from_everywhere_and_later_ones_win(config):
    path = config(plugins={"gdpo": {"group_eps": 0.5, "batch_eps": 0.5}}, experiment={"arms": 2})
    _, asked = understood(
        "--learning_rate", "1e-6", "--plugin", "shared-prefix", "--set", "gdpo.group_eps=0.25", "--config", path
    )
    assert [spec.name for spec in asked.specs] == ["gdpo", "shared-prefix"]  # the estimator first
    assert asked.plugins["gdpo"] == {"group_eps": 0.25, "batch_eps": 0.5}
    assert asked.kind == "grpo"
    assert not {"plugins", "experiment"} & set(asked.settings)
    assert asked.arguments == ["--learning_rate", "1e-6"]


def test_plugin_may_be_repeated_and_take_several():
    args, _ = understood("--plugin", "gdpo", "--beta", "0.1", "--plugin", "shared-prefix")
    assert args.plugin == ["gdpo", "shared-prefix"]


def test_the_worker_understands_what_is_forwarded(config):
    args, asked = understood("--plugin", "gdpo", "--set", "gdpo.group_eps=0.1", "--config", config(), "--beta", "0.1")
    _, same = understood(*command_line.forwarded(args, asked), *asked.arguments)
    assert (same.plugins, same.kind, same.settings, same.arguments) == (
        asked.plugins,
        asked.kind,
        asked.settings,
        asked.arguments,
    )


def test_env_block_is_set(config, monkeypatch):
    monkeypatch.setenv("TRL_EXT_TEST_VARIABLE", "before")
    _, asked = understood("--config", config(env={"TRL_EXT_TEST_VARIABLE": 3}))
    assert os.environ["TRL_EXT_TEST_VARIABLE"] == "3" and "env" not in asked.settings


def test_split_between_trl_and_accelerate():
    argv = ["--learning_rate", "2", "--num_processes", "2", "--use_peft", "--cpu", "--reward_funcs", "a.b", "c.d"]
    divided = trl_launch.split("grpo", argv, {"main_process_port": 0, "same_network": True, "debug_on": 1, "beta": 0.1})
    assert divided.trl == ["--learning_rate", "2", "--use_peft", "--reward_funcs", "a.b", "c.d"]
    assert divided.launch == [
        "--main_process_port",
        "0",
        "--same_network",
        "--debug_on",
        "1",
        "--num_processes",
        "2",
        "--cpu",
    ]
    assert divided.given == {"beta": 0.1, "learning_rate": 2.0, "use_peft": True, "reward_funcs": ["a.b", "c.d"]}


def test_the_parent_accepts_a_batch_that_only_several_processes_can_divide():
    """TRL's own parent refuses this: two rows a process, groups of four."""
    divided = trl_launch.split("grpo", ["--per_device_train_batch_size", "2", "--num_generations", "4"], {})
    assert divided.launch == []
    with pytest.raises(ConfigError, match=r"TRL refuses these settings: .*divisible"):
        arguments.parse("grpo", [*divided.trl, "--use_cpu", "true", "--bf16", "false"], {})


def test_accelerate_gets_its_options_and_the_worker():
    launch = trl_launch.launch_arguments(
        "grpo", ["--accelerate_config=zero2", "--num_processes", "3"], ["--a", "b"], ()
    )
    assert launch.config_file.endswith("zero2.yaml") and launch.num_processes == 3
    assert launch.module and launch.training_script == trl_launch.WORKER and launch.training_script_args == ["--a", "b"]


def test_several_processes_without_an_accelerator(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "")
    launch = trl_launch.launch_arguments("grpo", ["--num_processes", "2", "--cpu"], [], ())
    trl_launch.fit_to_machine(launch, accelerator=False)
    assert launch.multi_gpu and not launch.cpu and os.environ["ACCELERATE_USE_CPU"] == "true"
    assert launch.num_cpu_threads_per_process >= 1
    launch = trl_launch.launch_arguments("grpo", [], [], ())
    trl_launch.fit_to_machine(launch, accelerator=False)
    assert launch.cpu and not launch.multi_gpu and launch.num_processes == 1


def test_defaults_on_a_cpu_leave_the_users_choice():
    def defaults(*argv, mixed=None, **settings):
        return train.cpu_defaults(trl_launch.split("grpo", argv, settings), mixed)

    assert defaults() == {"use_cpu": True, "bf16": False}
    assert defaults("--bf16", "true", use_cpu=True) == {}
    assert defaults("--fp16", "true") == {"use_cpu": True}
    assert defaults(mixed="bf16") == {"use_cpu": True}


def test_settings_survive_as_arguments():
    values = {"reward_funcs": ["a.b", "c.d"], "use_peft": True, "save_strategy": "no", "learning_rate": 1e-3}
    divided = trl_launch.split("grpo", train.as_arguments(values), {})
    assert divided.given == values and divided.launch == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), (True, True), ("false", None), (False, None), (None, None), ("none", None), ("a/b", "a/b")],
)
def test_resume_words(value, expected):
    assert arguments.resume_value(value) == expected


def test_every_trainer_parses(model, data, tmp_path):
    for kind in ("grpo", "rloo", "dpo"):
        argv = ["--model_name_or_path", model, "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        parsed = arguments.parse(kind, argv, {"dataset_name": data["grpo"], "resume_from_checkpoint": "true"})
        assert parsed[1].resume_from_checkpoint is True and parsed[2].model_name_or_path == model
        assert json.loads(json.dumps(arguments.load_data(parsed)[0]))["prompt"]
