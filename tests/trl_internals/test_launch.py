"""A command line divided between TRL and accelerate."""

import os

import pytest

from trl_ext import ConfigError
from trl_ext.trl_internals import arguments
from trl_ext.trl_internals import launch as trl_launch


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
