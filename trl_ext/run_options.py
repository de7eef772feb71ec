"""What `trl_ext train` was told: its own options, and those of TRL and accelerate, still as strings."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import options, registry
from .errors import OptionError
from .plan import check_kind, common_trainers, compose
from .registry import PluginSpec, TrainerKind

OWN_BLOCKS = ("plugins", "experiment")
"""Blocks of the YAML file that TRL does not know."""


@dataclass(frozen=True)
class RunOptions:
    """A parsed command line.

    Attributes:
        specs: The plugins in the order in which they act.
        kind: The trainer.
        config: The YAML file without our own blocks, or empty.
        rest: Every argument that is not ours, in order.
        check_rewards: Whether reward functions are tried before the model is loaded.
        demo: Whether the embedded default supplies model and data.
    """

    specs: tuple[PluginSpec, ...]
    kind: TrainerKind
    config: dict[str, Any]
    rest: list[str]
    check_rewards: bool
    demo: bool


def build_parser() -> argparse.ArgumentParser:
    """Our own options of `trl_ext train`."""
    parser = argparse.ArgumentParser(
        prog="trl_ext train",
        usage="trl_ext train [--plugin NAME ...] [--config FILE] [TRL options] [accelerate options]",
        description="Trains with plugins. Without a model and data, trains the embedded demo.",
        epilog="Every option of `trl grpo`, `trl rloo` or `trl dpo` and of `accelerate launch` is taken as well, from\n"
        "the command line or the file; `trl_ext train --help-trl` lists TRL's. The command line wins over the file.\n\n"
        "  trl_ext train --plugin gdpo\n"
        "  trl_ext train --plugin gdpo --set gdpo.group_eps=1e-6 --config run.yaml --num_processes 8\n\n"
        "In the file, plugins are a block: `plugins: {gdpo: {group_eps: 1e-6}}`. Without it, the file is TRL's.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.add_argument("--help-trl", action="store_true", help="all options of TRL for the trainer")
    parser.add_argument(
        "--plugin", nargs="+", action="extend", default=[], metavar="NAME", help="names, file.py or module:attribute"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="PLUGIN.OPTION=VALUE", help="options of plugins"
    )
    parser.add_argument("--trainer", choices=registry.KINDS, help="default: grpo if every plugin serves it")
    parser.add_argument("--config", metavar="FILE", help="YAML file of TRL, with or without a block `plugins:`")
    parser.add_argument(
        "--no_reward_check", action="store_true", help="do not try reward functions before the model is loaded"
    )
    parser.add_argument("--trl_ext_demo", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(argv: list[str]) -> RunOptions:
    """Parses and checks everything that can be checked without torch or TRL.

    Raises:
        TrlExtError: An unknown plugin or option, a wrong file, plugins that do not fit together or the trainer.
    """
    own, rest = build_parser().parse_known_args(argv)
    config = read_yaml(own.config) if own.config else {}
    block = config.get("plugins")
    requests = registry.merge(own.plugin, block, options.parse_set(own.set))
    specs = compose(registry.resolve(requests))
    kind: TrainerKind = own.trainer or common_trainers(specs)[0]
    check_kind(specs, kind)
    config = {key: value for key, value in config.items() if key not in OWN_BLOCKS}
    demo = own.trl_ext_demo or not any(
        _names(name, rest, config) for name in ("model_name_or_path", "dataset_name", "datasets")
    )
    return RunOptions(specs, kind, config, rest, not own.no_reward_check, demo)


def read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file."""
    file = Path(path)
    if not file.is_file():
        raise OptionError(f"--config {path}: there is no such file (looked in {Path.cwd()}).")
    try:
        content = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise OptionError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise OptionError(
            f"--config {path} must hold a mapping of options, such as `learning_rate: 1.0e-6`; it holds "
            f"{type(content).__name__}."
        )
    return content


def _names(option: str, rest: list[str], config: dict[str, Any]) -> bool:
    return option in config or any(arg == f"--{option}" or arg.startswith(f"--{option}=") for arg in rest)
