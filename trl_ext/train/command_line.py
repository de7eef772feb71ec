"""Command line of `trl_ext train`: our own arguments, the YAML file, and the request that they make."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trl_ext_hooks import TrainerKind

from ..catalog import declaration, find, options
from ..catalog.declaration import PluginSpec
from ..errors import ConfigError, near
from ..plan.compose import check_kind, common_trainers, compose
from ..plan.stages import ROUNDS

BLOCKS = ("plugins", "experiment")
"""Keys of the YAML file that are ours. TRL gets the file without them."""
SIZES = ("train_size", "test_size")
"""Keys of the block `experiment:` that size the data of its task."""
OWN_OPTIONS = (
    *("--plugin", "--set", "--config", "--trainer", "--no_reward_check"),
    *("--inspect", "--no_save", "--help-trl"),
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
    started: str = ""


class Parser(argparse.ArgumentParser):
    """The parser of `trl_ext train`. It takes no abbreviations and raises our errors."""

    def __init__(self) -> None:
        super().__init__("trl_ext train", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        add_arguments(self)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\nSee `{self.prog} --help`.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds our own arguments to a command line whose rest belongs to TRL and accelerate."""
    parser.add_argument(
        "--plugin",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLUGIN",
        help="plugins in the order in which they act: name, file.py or module:attribute; may be repeated",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="PLUGIN.OPTION=VALUE",
        help="options of plugins, values read as YAML; these win over the YAML file",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with TRL's settings and a block `plugins:`")
    parser.add_argument(
        "--trainer",
        choices=declaration.KINDS,
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
    settings = read_config(args.config)
    block, experiment = (settings.pop(name, None) for name in BLOCKS)
    # recipes of `trl_ext compare` are accepted too: their block names the trainer and the task
    experiment = experiment if isinstance(experiment, Mapping) else {}
    requests = find.merge(args.plugin, block, options.parse_set(args.set))
    specs = compose(find.resolve(requests))
    kind: TrainerKind = args.trainer or experiment.get("trainer") or common_trainers(specs)[0]
    if kind not in declaration.KINDS:
        raise ConfigError(f"{args.config}: experiment.trainer is {kind!r}.{near(str(kind), declaration.KINDS)}")
    check_kind(specs, kind)
    if args.inspect and kind not in ROUNDS:
        raise ConfigError(f"--inspect records rounds of completions, and the {kind.upper()} trainer generates none.")
    sizes = {name: experiment[name] for name in SIZES if name in experiment}
    return Request(
        plugins=requests,
        specs=specs,
        kind=kind,
        config=args.config,
        settings=settings,
        arguments=rest,
        task=experiment.get("task"),
        sizes=sizes,
        check_rewards=not args.no_reward_check,
        inspect=args.inspect,
        save=not args.no_save,
        overwrite=args.overwrite,
        save_on_interrupt=args.save_on_interrupt,
        dry_run=args.dry_run,
    )


def read_config(path: str | None) -> dict[str, Any]:
    """Reads the YAML file, takes `env:` out and sets it in the environment, as TRL does.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold a mapping.
    """
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
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
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    return settings


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Writes settings as arguments of TRL's parser."""
    arguments: list[str] = []
    for name, value in settings.items():
        values = value if isinstance(value, list) else [value]
        arguments += [f"--{name}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in values)]
    return arguments


def say(message: str) -> None:
    """Tells the user on standard error what happens."""
    print(f"trl_ext: {message}", file=sys.stderr, flush=True)
