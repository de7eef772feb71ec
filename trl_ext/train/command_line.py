"""Command line of `trl_ext train`: our own arguments, the YAML file, and the request that they make."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_ext_hooks import TrainerKind

from ..catalog import declaration, find, names, options, recipes
from ..catalog.declaration import PluginSpec
from ..errors import ConfigError, TrlExtError, near
from ..plan.compose import check_kind, common_trainers, compose
from ..plan.stages import ROUNDS
from ..support import help
from ..support.console import tell
from .repeat import read_record

BLOCKS = ("plugins", "experiment")
"""Blocks of the YAML file that are ours. TRL gets the file without them."""
ONLY_TYPED = (
    *("help", "help_trl", "plugin", "set", "config", "no_file_plugins", "write_config", "dry_run", "overwrite"),
)
"""Our own options that are no keys of the YAML file."""
SIZES = ("train_size", "test_size")
"""Keys of the block `experiment:` that size the data of its task."""
OWN_OPTIONS = (
    *("--plugin", "--set", "--config", "--trainer", "--no_reward_check"),
    *("--inspect", "--no_save", "--no_file_plugins", "--write_config", "--help-trl"),
    *("--dry_run", "--overwrite", "--save_on_interrupt"),
)
"""Our own options, for the hint at a misspelt one."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for, checked.

    Attributes:
        plugins: Option values by plugin reference.
        specs: The plugins in the order in which they act.
        kind: The trainer.
        config: The path of the YAML file, or None.
        settings: What the YAML file holds for TRL and accelerate.
        arguments: The command line without our own arguments, for TRL and accelerate.
        task: The task of the lab to train on, from the block `experiment:`. None if the settings name model and data.
        sizes: The sizes of the task's data that the block gives.
        check_rewards: Whether to try the reward functions before the model is loaded.
        inspect: How many rounds to record, or None.
        save: Whether to save checkpoints and the final model.
        overwrite: Whether the run may replace an older one in its output folder.
        save_on_interrupt: Whether Ctrl-C saves a checkpoint before the run ends.
        dry_run: Whether to check and show everything, and to train nothing.
        bars: Whether the user wants the progress bars of transformers.
        command: The command line of the user.
        own: Our own options that differ from their defaults, as keys of the YAML file.
        environment: The block `env:` of the file.
        experiment: The block `experiment:` of the file.
        config_to_repeat: What was asked for, as the content of one YAML file.
        filled_in: Settings of TRL that nobody asked for: defaults of the machine and of the embedded demo.
        started: When the run was started.
    """

    plugins: dict[str, dict[str, Any]]
    specs: tuple[PluginSpec, ...]
    kind: TrainerKind
    config: str | None
    settings: dict[str, Any]
    arguments: list[str]
    task: str | None = None
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    check_rewards: bool = True
    inspect: int | None = None
    save: bool = True
    overwrite: bool = False
    save_on_interrupt: bool = False
    dry_run: bool = False
    bars: bool = False
    command: str = ""
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    experiment: dict[str, Any] = dataclasses.field(default_factory=dict)
    config_to_repeat: dict[str, Any] = dataclasses.field(default_factory=dict)
    filled_in: dict[str, Any] = dataclasses.field(default_factory=dict)
    started: str = ""


class Parser(help.Parser):
    """The parser of `trl_ext train`."""

    def __init__(self) -> None:
        super().__init__("trl_ext train")
        add_arguments(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds our own arguments to a command line whose rest belongs to TRL and accelerate."""
    parser.add_argument(
        "--plugin",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLUGIN",
        help="plugins in the order in which they act: name, file.py or module:attribute; may be repeated; added to "
        "those of the YAML file",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLUGIN.OPTION=VALUE",
        help="options of plugins, values read as YAML; these win over the YAML file",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file with TRL's settings and a block `plugins:`, the name of a recipe (`trl_ext recipes`), or the "
        "trl_ext_run.json of a run, which repeats it",
    )
    parser.add_argument(
        "--no_file_plugins",
        action="store_true",
        help="leave out the block `plugins:` of the YAML file: plain TRL, or the plugins of --plugin alone",
    )
    parser.add_argument(
        "--write_config",
        metavar="FILE",
        help="write the whole run as a YAML file for --config, and do not train",
    )
    parser.add_argument(
        "--trainer",
        choices=declaration.KINDS,
        type=str.lower,
        help="TRL's trainer (default: the first of these that all plugins serve)",
    )
    parser.add_argument(
        "--no_reward_check",
        action="store_true",
        help="do not try the reward functions, in a process of their own, before the model is loaded",
    )
    parser.add_argument(
        "--inspect",
        type=_round_count,
        metavar="N",
        help="record the first N rounds for `trl_ext inspect`: tokens, rewards and advantages before and after each "
        "plugin; changes no number of the run",
    )
    parser.add_argument(
        "--no_save",
        action="store_true",
        help="save no model: neither checkpoints nor the final one",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run in output_dir: its checkpoints, model and record are removed when training begins",
    )
    parser.add_argument(
        "--save_on_interrupt",
        "--save-on-interrupt",
        action="store_true",
        help="at Ctrl-C finish the round and save a checkpoint; a second Ctrl-C leaves at once",
    )
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="check everything short of loading the model, print the plan, and train nothing; needs no GPU",
    )


def _round_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of rounds, at least 1, got {text!r}")
    return int(text)


def understand(args: argparse.Namespace, rest: list[str]) -> Request:
    """Reads the YAML file, finds the plugins and checks that they fit together and with the trainer.

    Raises:
        TrlExtError: The request cannot work. Nothing of TRL has been loaded by then.
    """
    check_words(rest)
    config = None if args.config is None else recipes.locate(args.config)
    settings, environment = read_file(config)
    os.environ.update(environment)
    block, experiment = (settings.pop(name, None) for name in BLOCKS)
    typed_trainer = args.trainer
    _take_own_keys(args, settings)
    block = None if args.no_file_plugins else block
    # recipes of `trl_ext compare` are accepted too: their block names the trainer and the task
    experiment = experiment if isinstance(experiment, Mapping) else {}
    task, wanted = experiment.get("task"), experiment.get("trainer")
    if config is not None:  # Python files that it names stand beside it
        task = recipes.beside(task, config) if isinstance(task, str) else task
        if isinstance(block, Mapping):
            block = {recipes.beside(str(reference), config): values for reference, values in block.items()}
    if wanted not in (None, *declaration.KINDS):
        raise ConfigError(f"{args.config}: experiment.trainer is {wanted!r}.{near(str(wanted), declaration.KINDS)}")
    try:
        requests = find.merge(args.plugin, block, options.parse_set(args.set))
        specs = compose(find.resolve(requests))
        kind: TrainerKind = args.trainer or wanted or common_trainers(specs)[0]
        check_kind(specs, kind)
    except TrlExtError as error:
        message = _with_sources(str(error), args, block, typed_trainer)
        if block and args.plugin and isinstance(error, ConfigError):
            message += "\n--no_file_plugins leaves out those of the file."
        raise type(error)(message) from error
    if args.inspect and kind not in ROUNDS:
        raise ConfigError(f"--inspect records rounds of completions, and the {kind.upper()} trainer generates none.")
    sizes = {name: experiment[name] for name in SIZES if name in experiment}
    return Request(
        plugins=requests,
        specs=specs,
        kind=kind,
        config=config,
        settings=settings,
        arguments=rest,
        task=task,
        sizes=sizes,
        check_rewards=not args.no_reward_check,
        inspect=args.inspect,
        save=not args.no_save,
        own={name: value for name in file_keys() if (value := getattr(args, name)) not in (None, False)},
        environment=environment,
        experiment=dict(experiment),
        overwrite=args.overwrite,
        save_on_interrupt=args.save_on_interrupt,
        dry_run=args.dry_run,
    )


def file_keys() -> dict[str, argparse.Action]:
    """Returns our own options that the YAML file may set too, by name."""
    return {action.dest: action for action in Parser()._actions if action.dest not in ONLY_TYPED}


def _take_own_keys(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Moves our own options from the settings of the YAML file to the arguments, where the command line has none.

    Raises:
        ConfigError: One has a value that the command line would refuse.
    """
    for name, action in file_keys().items():
        if name not in settings:
            continue
        value = settings.pop(name)
        if action.nargs == 0 and not isinstance(value, bool):
            raise ConfigError(f"{args.config}: {name}: expected true or false, got {value!r}.")
        if action.nargs != 0 and value is not None:
            try:
                value = action.type(str(value)) if callable(action.type) else value
            except argparse.ArgumentTypeError as error:
                raise ConfigError(f"{args.config}: {name}: {error}.") from error
        if action.choices is not None and value not in (None, *action.choices):
            raise ConfigError(f"{args.config}: {name}: got {value!r}.{near(str(value), action.choices)}")
        if getattr(args, name) == action.default:
            setattr(args, name, value)


def _with_sources(message: str, args: argparse.Namespace, block: Any, trainer: str | None) -> str:
    """Says of an error which plugins stand in the YAML file and which were typed."""
    if not block:
        return message
    lists = {"--plugin": args.plugin, "--set": args.set}
    typed = [f"{name} {' '.join(values)}" for name, values in lists.items() if values]
    typed += [f"--trainer {trainer}"] if trainer else []
    if not typed:
        return f"{args.config}: {message}"
    listed = ", ".join(map(str, block)) if isinstance(block, Mapping) else block
    return f"{message}\nFrom `plugins:` of {args.config}: {listed}. From the command line: {', '.join(typed)}."


def check_words(rest: Sequence[str]) -> None:
    """Refuses a value before the first option that is not ours, such as `gdpo` in `trl_ext train gdpo`.

    Args:
        rest: The command line without our own options.

    Raises:
        ConfigError: With the option that the value belongs to.
    """
    if rest and not rest[0].startswith("-"):
        option = names.option_for(rest[0], find.known())
        way = "Values follow an option, as in --learning_rate 1e-6; a text with spaces needs quotes."
        if option is not None:
            way = f"Write {option} {shlex.quote(rest[0])} instead."
        raise ConfigError(f"unexpected value {rest[0]!r}. {way}")


def read_config(path: str | None) -> dict[str, Any]:
    """Reads the YAML file, takes `env:` out and sets it in the environment, as TRL does. Takes the record of a run too.

    Raises:
        ConfigError: As `read_file`.
    """
    settings, environment = read_file(path)
    os.environ.update(environment)
    return settings


def read_file(path: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads the YAML file, and returns its keys without `env:`, and the variables of that block.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold a mapping.
    """
    if path is None:
        return {}, {}
    try:
        content = read_record(path) if path.endswith(".json") else yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error} (looked in {Path.cwd()}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"--config {path} must hold a mapping of settings, such as `learning_rate: 1.0e-6`; it holds "
            f"{'nothing' if content is None else type(content).__name__}."
        )
    settings = {str(key): value for key, value in content.items()}
    environment = settings.pop("env", {})
    if not isinstance(environment, Mapping):
        raise ConfigError(f"--config {path}: `env` must be a mapping of environment variables, got {environment!r}.")
    return settings, {str(key): str(value) for key, value in environment.items()}


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Writes settings as arguments of TRL's parser."""
    arguments: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return arguments


def say(message: str) -> None:
    """Tells the user on standard error what happens."""
    tell(f"trl_ext: {message}")
