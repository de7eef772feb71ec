"""Names that people type for a plugin, and hints that work when they are followed."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Literal

import pytest
import yaml

import trl_ext
from trl_ext import ConfigError, OptionError, UnknownPluginError
from trl_ext.catalog import find, names, options
from trl_ext.cli import main, train
from trl_ext.trl_internals import arguments, launch


def message(reference: str) -> str:
    with pytest.raises(UnknownPluginError) as error:
        find.find(reference)
    return str(error.value)


@pytest.mark.parametrize(
    ("reference", "kind", "setting", "value"),
    [
        ("dapo", "grpo", "loss_type", "dapo"),
        ("DR_GRPO", "grpo", "loss_type", "dr_grpo"),
        ("dr-grpo", "grpo", "loss_type", "dr_grpo"),
        ("apo_zero", "dpo", "loss_type", ["apo_zero"]),
        ("apo-down", "dpo", "loss_type", ["apo_down"]),
        ("gspo", "grpo", "importance_sampling_level", "sequence"),
    ],
)
def test_a_loss_of_trl(reference: str, kind: str, setting: str, value: object) -> None:
    """The command of the hint reaches TRL's parser, which takes it; the settings in Python make a configuration."""
    text = message(reference)
    (command,) = re.findall(r"`trl_ext train (.*?)`", text)
    args, rest = train.build_parser().parse_known_args(shlex.split(command))
    assert args.trainer == kind
    divided = launch.split(kind, rest, {})  # type: ignore[arg-type]
    assert divided.given[setting] == value and divided.launch == []
    on_cpu = ["--use_cpu", "true", "--bf16", "false"]
    assert getattr(arguments.parse(kind, [*divided.trl, *on_cpu], {})[1], setting) == value  # type: ignore[arg-type]
    for config, given in re.findall(r"`(\w+)Config\(loss_type='(\w+)'\)`", text):
        assert (config, given) == (kind.upper(), reference.lower().replace("-", "_"))


@pytest.mark.parametrize("reference", ["grpo", "RLOO", "dpo"])
def test_a_trainer_of_trl(reference: str) -> None:
    (command,) = re.findall(r"`trl_ext train (.*?)`", message(reference))
    args, rest = train.build_parser().parse_known_args(shlex.split(command))
    assert args.trainer == reference.lower() and rest == []


@pytest.mark.parametrize("reference", ["gdpo,otc", "gdpo, otc", "gdpo otc", "gdpo+otc", "gdpo;otc"])
def test_several_names_in_one(reference: str) -> None:
    text = message(reference)
    (command,) = re.findall(r"(--plugin [\w -]*?) on the command line", text)
    args, rest = train.build_parser().parse_known_args(shlex.split(command))
    assert args.plugin == ["gdpo", "otc"] and rest == []
    assert [spec.name for spec in find.resolve(find.merge(args.plugin, None, {}))] == ["gdpo", "otc"]
    (call,) = re.findall(r"trl_ext\.(enable\(.*?\)) in Python", text)
    with eval(f"trl_ext.{call}", {"trl_ext": trl_ext}) as handle:
        assert [spec.name for spec in handle.specs] == ["gdpo", "otc"]
    (block,) = re.findall(r"in YAML `plugins: (.*?)`", text)
    assert list(find.merge([], options.parse_set([f"a.b={block}"])["a"]["b"], {})) == ["gdpo", "otc"]


def test_several_names_are_told_before_their_options() -> None:
    with pytest.raises(UnknownPluginError, match="--plugin gdpo otc on the command line"):
        find.merge(["gdpo,otc"], None, options.parse_set(["gdpo.batch_norm=false"]))
    assert message("gdpo,").count("--plugin gdpo on the command line") == 1


@pytest.mark.parametrize("reference", ["GDPO", "vl_dac", "VL-DAC", "Shared_Prefix"])
def test_other_spellings_are_understood(reference: str) -> None:
    cls = find.find(reference)[0]
    assert cls.name == names.canonical(reference)
    assert list(find.merge([reference], None, {cls.name: {"x": 1}})) == [cls.name]
    assert list(find.merge([cls.name], None, {reference: {"x": 1}})) == [cls.name]


def test_a_misspelt_name_still_gets_the_near_ones() -> None:
    assert "Did you mean 'gdpo'" in message("gdop") and "Known: apo, " in message("gdop")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("gdpo --max_steps 2", "trl_ext train --plugin gdpo --max_steps 2"),
        ("VL_DAC", "trl_ext train --plugin VL_DAC"),
        ("my_method.py", "trl_ext train --plugin my_method.py"),
        ("grpo --plugin gdpo", "trl_ext train --trainer grpo --plugin gdpo"),
        ("run.yaml", "trl_ext train --config run.yaml"),
        ("--plugin gdpo --set gdpo.batch_norm=false", "trl_ext train --plugin gdpo --set gdpo.batch_norm=false"),
        ("--plugin=gdpo", "trl_ext train --plugin=gdpo"),
    ],
)
def test_a_command_line_without_its_command(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(shlex.split(line)) == 2
    assert f"Write `{hint}`." in capsys.readouterr().err
    args, _ = train.build_parser().parse_known_args(shlex.split(hint)[2:])
    assert args.plugin or args.config


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("gdpo", "--plugin gdpo"),
        ("gdpo otc --learning_rate 1e-6", "--plugin gdpo"),
        ("--no_save my_method.py", "--plugin my_method.py"),
        ("GRPO --plugin gdpo", "--trainer GRPO"),
        ("run.yaml", "--config run.yaml"),
    ],
)
def test_a_value_without_its_option(line: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", *shlex.split(line)]) == 2
    assert f"Write {hint} instead." in capsys.readouterr().err
    train.build_parser().parse_args(shlex.split(hint))


def test_a_value_that_is_nothing_we_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "what"]) == 2
    assert "unexpected value 'what'. Values follow an option" in capsys.readouterr().err


def test_inspect_with_a_plugin_in_place_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", "gdpo"]) == 2
    assert "write `trl_ext inspect --plugin gdpo`" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["None", "none"])
@pytest.mark.parametrize(("plugin", "option"), [("p3o", "reward_clip"), ("tgdpo", "guide"), ("apo", "reward_weights")])
def test_none_for_null_in_an_option(plugin: str, option: str, text: str) -> None:
    """For an option that holds text it would be a text of four letters."""
    cls = find.find(plugin)[0]
    with pytest.raises(OptionError, match=f"{plugin}.{option}: '{text}' is a text") as error:
        options.build(cls.Options, {option: text}, plugin)
    (way,) = re.findall(r"--set (\S+),", str(error.value))
    assert options.parse_set([way]) == {plugin: {option: None}}
    (line,) = re.findall(r"`(.*?)` in YAML", str(error.value))
    assert yaml.safe_load(line) == {option: None}
    required = {"reward_func": "module:function"} if plugin == "tgdpo" else {}
    assert getattr(options.build(cls.Options, {option: None} | required, plugin), option) is None


def test_none_where_it_is_a_choice_or_no_null_exists() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        choice: Literal["none", "all"] | None = "all"
        text: str = ""

    assert options.build(Options, {"choice": "none", "text": "None"}, "x") == Options("none", "None")


def test_none_for_null_in_a_setting_of_trl() -> None:
    for given in ((["--run_name", "None"], {}), ([], {"dataset_config": "None"})):
        with pytest.raises(ConfigError, match="'None' would be taken for a text") as error:
            launch.split("grpo", *given)
        (line,) = re.findall(r"write `(.*?)` in the YAML file", str(error.value))
        ((name, value),) = launch.split("grpo", [], yaml.safe_load(line)).given.items()
        assert name in ("run_name", "dataset_config") and value is None
    with pytest.raises(ConfigError, match="Leave the setting out for TRL's default"):
        launch.split("grpo", ["--max_steps", "None"], {})
    assert launch.split("grpo", ["--report_to", "none", "--resume_from_checkpoint", "None"], {}).given
