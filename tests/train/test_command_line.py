"""Our own arguments, the YAML file, and what the worker makes of its part."""

import os

from trl_ext import ConfigError, OptionError, lab
from trl_ext.train import command_line
from trl_ext.trl_internals import launch as trl_launch

from ..refusals import refused


def understood(*argv):
    args, rest = command_line.Parser().parse_known_args([*map(str, argv)])
    return args, command_line.understand(args, rest)


def test_plugins_come_from_everywhere_and_later_ones_win(config):
    path = config(plugins={"gdpo": {"group_eps": 0.5, "batch_eps": 0.5}}, experiment={"arms": 2})
    _, request = understood(
        "--learning_rate", "1e-6", "--plugin", "shared-prefix", "--set", "gdpo.group_eps=0.25", "--config", path
    )
    assert [spec.name for spec in request.specs] == ["gdpo", "shared-prefix"]  # the file comes first
    assert request.plugins["gdpo"] == {"group_eps": 0.25, "batch_eps": 0.5}
    assert request.kind == "grpo"
    assert not {"plugins", "experiment"} & set(request.settings)
    assert request.arguments == ["--learning_rate", "1e-6"]


def test_config_takes_the_name_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Python files of a recipe stand beside it, wherever the command runs
    _, request = understood("--config", "thinkless")
    assert [spec.name for spec in request.specs] == ["thinkless"] and request.config.endswith("tiny/thinkless.yaml")
    assert lab.task(request.task).name and request.settings["beta"] == 0.0
    plugin = "from trl_ext_hooks import Plugin\nclass Mine(Plugin):\n    name, trainers = 'mine', ('grpo',)\n"
    (tmp_path / "mine.py").write_text(plugin)
    (tmp_path / "thinkless").write_text("plugins:\n  mine.py:\n")
    _, request = understood("--config", "thinkless")
    assert [spec.name for spec in request.specs] == ["mine"] and request.config == "thinkless"


def test_plugin_may_be_repeated_and_take_several():
    args, _ = understood("--plugin", "gdpo", "--beta", "0.1", "--plugin", "shared-prefix")
    assert args.plugin == ["gdpo", "shared-prefix"]


def test_env_block_is_set(config, monkeypatch):
    monkeypatch.setenv("TRL_EXT_TEST_VARIABLE", "before")
    _, request = understood("--config", config(env={"TRL_EXT_TEST_VARIABLE": 3}))
    assert os.environ["TRL_EXT_TEST_VARIABLE"] == "3" and "env" not in request.settings


def test_settings_survive_as_arguments():
    values = {"reward_funcs": ["a.b", "c.d"], "use_peft": True, "save_strategy": "no", "learning_rate": 1e-3}
    divided = trl_launch.split("grpo", command_line.as_arguments(values), {})
    assert divided.given == values and divided.launch == []


def test_no_file_plugins_leaves_out_those_of_the_file(config):
    path = config(plugins={"gdpo": {"group_eps": 0.5}})
    assert understood("--config", path)[1].plugins == {"gdpo": {"group_eps": 0.5}}
    assert understood("--config", path, "--no_file_plugins")[1].plugins == {}
    assert understood("--config", path, "--no_file_plugins", "--plugin", "p3o")[1].plugins == {"p3o": {}}


def test_our_own_options_stand_in_the_file_too_and_the_command_line_wins(config):
    path = config(trainer="rloo", inspect=2, no_save=True, no_reward_check=False, experiment={"trainer": "grpo"})
    _, request = understood("--config", path)
    assert (request.kind, request.inspect, request.save, request.check_rewards) == ("rloo", 2, False, True)
    assert not {"trainer", "inspect", "no_save", "no_reward_check"} & set(request.settings)
    assert request.own == {"trainer": "rloo", "inspect": 2, "no_save": True}
    _, request = understood("--config", path, "--trainer", "grpo", "--inspect", "1")
    assert (request.kind, request.inspect) == ("grpo", 1)


def test_a_conflict_says_what_stands_in_the_file_and_what_was_typed(config):
    path = config(plugins={"gdpo": {}})
    with refused(
        ConfigError,
        "plugins 'p3o' and 'gdpo' cannot be combined",
        f"\nFrom `plugins:` of {path}: gdpo. From the command line: --plugin p3o.\n--no_file_plugins leaves out those",
    ):
        understood("--config", path, "--plugin", "p3o")
    with refused(ConfigError, "cannot serve the RLOO trainer", f"{path}: gdpo. From the command line: --trainer rloo."):
        understood("--config", path, "--trainer", "rloo")
    with refused(OptionError, "no option 'x'", "From the command line: --set gdpo.x=1."):
        understood("--config", path, "--set", "gdpo.x=1")
    with refused(ConfigError, f"{config(plugins={'gdpo': {}, 'p3o': {}})}: plugins ", "cannot be combined"):
        understood("--config", path)
