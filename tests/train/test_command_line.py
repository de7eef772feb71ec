"""Our own arguments, the YAML file, and what the worker makes of its part."""

import os

from trl_ext.train import command_line
from trl_ext.trl_internals import launch as trl_launch


def understood(*argv):
    args, rest = command_line.Parser().parse_known_args([*map(str, argv)])
    return args, command_line.understand(args, rest)


def test_plugins_come_from_everywhere_and_later_ones_win(config):
    path = config(plugins={"gdpo": {"group_eps": 0.5, "batch_eps": 0.5}}, experiment={"arms": 2})
    _, request = understood(
        "--learning_rate", "1e-6", "--plugin", "shared-prefix", "--set", "gdpo.group_eps=0.25", "--config", path
    )
    assert [spec.name for spec in request.specs] == ["shared-prefix", "gdpo"]
    assert request.plugins["gdpo"] == {"group_eps": 0.25, "batch_eps": 0.5}
    assert request.kind == "grpo"
    assert not {"plugins", "experiment"} & set(request.settings)
    assert request.arguments == ["--learning_rate", "1e-6"]


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
