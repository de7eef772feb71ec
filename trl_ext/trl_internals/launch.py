"""Accelerate's launcher, and a command line divided between it and TRL."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError, near
from .arguments import trl_parser

WORKER = "trl_ext.train.worker"
_RESERVED = {"--module", "-m", "--no_python", "--no-python", "-h", "--help"}
"""Accelerate options that decide what is launched, which is ours to say."""


@dataclasses.dataclass(frozen=True)
class Split:
    """A command line and YAML settings, divided between TRL and accelerate.

    Attributes:
        trl: Arguments of TRL.
        launch: Arguments of `accelerate launch`, from the command line and the YAML file.
        given: TRL settings that the user set, from either place, by name.
    """

    trl: list[str]
    launch: list[str]
    given: dict[str, Any]


def split(kind: TrainerKind, argv: Sequence[str], settings: Mapping[str, Any]) -> Split:
    """Divides a command line and YAML settings as `trl` does. Values are checked by name and type only.

    Raises:
        ConfigError: A TRL option has a value of a wrong type.
    """
    parser = trl_parser(kind)
    foreign = parser.apply(settings)
    _, unknown = parser.parse_known_args(list(argv))
    silent = trl_parser(kind)
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    typed = vars(silent.parse_known_args(list(argv))[0])
    given = {name: value for name, value in settings.items() if name not in foreign} | typed
    trl_parser(kind).refuse_none(given)
    return Split(_without(argv, unknown), [*_flags(settings, foreign), *unknown], given)


def options() -> dict[str, argparse.Action]:
    """Returns the options of accelerate's launcher that a user may set, by name."""
    actions = {action.dest: action for action in _launch_parser()._actions if action.option_strings}
    reserved = {action.dest for action in actions.values() if _RESERVED & set(action.option_strings)}
    presets = argparse.Action(
        ["--accelerate_config"], "accelerate_config", help="A preset of TRL, such as zero2, or a file."
    )
    return {name: action for name, action in actions.items() if name not in reserved} | {presets.dest: presets}


def given_options(launch: Sequence[str]) -> dict[str, Any]:
    """Returns accelerate's part of a command line as values by name, without defaults."""
    parser = _launch_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if not action.option_strings:
            action.nargs = "*"  # the training script, which is ours to name
    parser.add_argument("--accelerate_config", default=argparse.SUPPRESS)
    values = vars(parser.parse_known_args(list(launch))[0])
    return {name: value for name, value in values.items() if name in options()}


def _without(argv: Sequence[str], removed: Sequence[str]) -> list[str]:
    """Returns `argv` without an ordered subsequence of it."""
    kept, left = [], list(removed)
    for argument in argv:
        if left and argument == left[0]:
            left.pop(0)
        else:
            kept.append(argument)
    return kept


def _flags(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Writes YAML settings as accelerate takes them. `cpu: true` is a bare flag, and `cpu: false` is nothing."""
    flags: list[str] = []
    switches = {action.dest for action in _launch_parser()._actions if action.nargs == 0}
    for name in names:
        value = settings[name]
        if name in switches and isinstance(value, bool):
            flags += [f"--{name}"] if value else []
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _launch_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    def error(message: str) -> NoReturn:
        raise ConfigError(f"{message}\n`accelerate launch --help` lists the options of the launcher.")

    parser: argparse.ArgumentParser = launch_command_parser()
    parser.error = error  # type: ignore[method-assign]
    return parser


def launch_arguments(kind: TrainerKind, launch: Sequence[str], worker: Sequence[str], own: Sequence[str]) -> Any:
    """Parses the arguments of accelerate that start the worker.

    Args:
        kind: The trainer, whose options are named in errors.
        launch: Accelerate's part of the command line.
        worker: Arguments of the worker.
        own: Our own options, to be named in errors.

    Raises:
        ConfigError: An option that neither TRL nor accelerate has, or a value without an option.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    pieces = [part for item in launch for part in _pair(item, "--accelerate_config")]
    try:
        resolved = resolve_accelerate_config_argument(pieces)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    parser = _launch_parser()
    _check_options(kind, parser, resolved, own)
    return parser.parse_args([*resolved, "--module", WORKER, *worker])


def _pair(argument: str, option: str) -> list[str]:
    return [option, argument.partition("=")[2]] if argument.startswith(f"{option}=") else [argument]


def _check_options(
    kind: TrainerKind, parser: argparse.ArgumentParser, arguments: Sequence[str], own: Sequence[str]
) -> None:
    known = {name: action for name, action in parser._option_string_actions.items() if name not in _RESERVED}
    index = 0
    while index < len(arguments):
        option, equals, _ = arguments[index].partition("=")
        if not option.startswith("-"):
            raise ConfigError(
                f"unexpected value {option!r}. Values follow an option, as in --learning_rate 1e-6; a text with spaces "
                f"needs quotes."
            )
        if option not in known:
            names = {*(f"--{name}" for name in trl_parser(kind).options()), *own, *known, "--accelerate_config"}
            spelled = {name for name in names if "-" not in name.lstrip("-")}  # both have twins with hyphens
            hint = near(option, spelled).partition(" Known:")[0]
            raise ConfigError(
                f"neither trl_ext, TRL's {kind.upper()} nor accelerate has an option {option}.{hint} "
                f"See `trl_ext train --help`."
            )
        index += 1 if equals or known[option].nargs == 0 else 2


def fit_to_machine(args: Any, accelerator: bool) -> None:
    """Fills in what accelerate would guess badly on a machine without an accelerator.

    There it starts one process however many were asked for, and gives that one a single thread.
    """
    import torch

    _no_default_warnings()
    if accelerator or args.config_file is not None or args.use_deepspeed or args.use_fsdp or args.tpu:
        return
    processes = args.num_processes or 1
    if args.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        args.num_cpu_threads_per_process = max(1, torch.get_num_threads() // processes)
    local = processes > 1 and args.mpirun_hostfile is None and (args.num_machines or 1) == 1
    args.num_processes = processes
    args.cpu, args.multi_gpu = not local, local  # `multi_gpu` is accelerate's word for several processes
    os.environ["ACCELERATE_USE_CPU"] = "true"


def _no_default_warnings() -> None:
    """Keeps accelerate from warning about each default that it takes."""
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)


_OF_THE_RUN = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_")
"""Beginnings of the variables by which accelerate's launcher tells the workers how the run is distributed."""


def planned(args: Any) -> tuple[int | None, dict[str, str]]:
    """Returns what a launch would give its workers: how many they are, and the variables that describe the run.

    The number is None where the machine decides, which may be another one.

    Raises:
        ConfigError: Accelerate refuses the settings.
    """
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils import launch as preparation

    _no_default_warnings()
    asked = args.num_processes
    args.main_process_port = 0  # nothing listens, so no port has to be free
    try:
        args, defaults, _ = _validate_launch_command(args)
        processes = asked or (defaults.num_processes if defaults is not None else None)
        args.num_processes = processes or 1
        if args.cpu:
            environment = preparation.prepare_simple_launcher_cmd_env(args)[1]
        elif args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config if defaults else ())
            environment = preparation.prepare_deepspeed_cmd_env(args)[1]
        elif args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
            environment = preparation.prepare_multi_gpu_env(args)
        else:
            environment = preparation.prepare_simple_launcher_cmd_env(args)[1]
    except (ValueError, AssertionError, ConnectionError) as error:
        raise ConfigError(f"accelerate refuses these settings: {error}") from error
    return processes, {name: value for name, value in environment.items() if name.startswith(_OF_THE_RUN)}


def launch(args: Any) -> int:
    """Runs accelerate's launcher until the workers end, and returns an exit code."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.multiprocessing.errors"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the workers' errors are reported by us
    # Ctrl-C is handled by our caller; a torch that knows no such setting ends the workers within 30 s
    args.signals_to_handle = "SIGTERM,SIGHUP,SIGQUIT"
    try:
        launch_command(args)
    except SignalException as error:
        return 128 + int(error.sigval)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return min((failure.exitcode for failure in error.failures.values()), default=1) or 1
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise ConfigError(f"accelerate refuses these settings: {error}") from error
    return 0


def accelerator_found() -> bool:
    """Tells whether PyTorch sees CUDA, XPU, MPS or another accelerator."""
    import torch

    return bool(torch.accelerator.is_available())
