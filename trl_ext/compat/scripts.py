"""TRL's command line and scripts, and accelerate's launcher: everything private that `trl_ext train` uses of them.

Checked against the TRL versions in `seams.TESTED`. The parent process only splits a command line: building TRL's
training arguments there, in one process, would refuse batches that are valid in several.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, NoReturn

from trl import TrlParser

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError, near
from .seams import trainer_class

WORKER = "trl_ext.worker"
_RESERVED = {"--module", "-m", "--no_python", "--no-python", "-h", "--help"}
"""Accelerate options that decide what is launched, which is ours to say."""

Parsed = tuple[Any, Any, Any, Any]
"""Script, training, model and dataset arguments, as TRL's `main` functions take them."""


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


class _Parser(TrlParser):
    """TRL's parser with YAML settings that were read before, and with our errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n`trl_ext train --help-trl` lists TRL's options.")

    def apply(self, settings: Mapping[str, Any]) -> list[str]:
        """Makes settings the defaults; returns the names that are not TRL's."""
        known = {action.dest for action in self._actions}
        self.set_defaults_with_config(**{name: value for name, value in settings.items() if name in known})
        return [name for name in settings if name not in known]

    def options(self) -> list[str]:
        return [action.dest for action in self._actions]


def _script(kind: TrainerKind) -> ModuleType:
    return importlib.import_module(f"trl.scripts.{kind}")


def trl_parser(kind: TrainerKind) -> _Parser:
    """TRL's parser for one trainer. Abbreviated options, which TRL guesses, are refused: most are slips."""
    types = _script(kind).make_parser().dataclass_types
    return _Parser(types, prog=f"trl_ext train --trainer {kind}", allow_abbrev=False)


def split(kind: TrainerKind, argv: Sequence[str], settings: Mapping[str, Any]) -> Split:
    """Divides a command line and YAML settings as `trl` does; values are checked by name and type only.

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
    return Split(_without(argv, unknown), [*_flags(settings, foreign), *unknown], given)


def _without(argv: Sequence[str], removed: Sequence[str]) -> list[str]:
    """`argv` less an ordered subsequence of it."""
    kept, left = [], list(removed)
    for argument in argv:
        if left and argument == left[0]:
            left.pop(0)
        else:
            kept.append(argument)
    return kept


def _flags(settings: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """YAML settings as accelerate takes them: `cpu: true` is a bare flag, `cpu: false` is nothing."""
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
    """Parsed accelerate arguments that start the worker.

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

    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it warns about each default that it takes
    if accelerator or args.config_file is not None or args.use_deepspeed or args.use_fsdp or args.tpu:
        return
    processes = args.num_processes or 1
    if args.num_cpu_threads_per_process is None and "OMP_NUM_THREADS" not in os.environ:
        args.num_cpu_threads_per_process = max(1, torch.get_num_threads() // processes)
    local = processes > 1 and args.mpirun_hostfile is None and (args.num_machines or 1) == 1
    args.num_processes = processes
    args.cpu, args.multi_gpu = not local, local  # `multi_gpu` is accelerate's word for several processes
    os.environ["ACCELERATE_USE_CPU"] = "true"


def launch(args: Any) -> int:
    """Runs accelerate's launcher until the workers end; returns an exit code."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.multiprocessing.errors"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the workers' errors are reported by us
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ChildFailedError as error:
        return min((failure.exitcode for failure in error.failures.values()), default=1) or 1
    except ValueError as error:
        raise ConfigError(f"accelerate refuses these settings: {error}") from error
    return 0


def parse(kind: TrainerKind, argv: Sequence[str], settings: Mapping[str, Any]) -> Parsed:
    """TRL's four argument objects, checked by TRL in the process that trains.

    Raises:
        ConfigError: TRL refuses a value or a combination.
    """
    parser = trl_parser(kind)
    parser.apply(settings)
    try:
        parsed = parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"TRL refuses these settings: {error}") from error
    training = parsed[1]
    training.resume_from_checkpoint = resume_value(training.resume_from_checkpoint)
    return (parsed[0], training, parsed[2], parsed[3])


def resume_value(value: Any) -> str | bool | None:
    """`true`, `false` and `none` are words on a command line and values in YAML."""
    if isinstance(value, str):
        return {"true": True, "false": None, "none": None}.get(value.lower(), value)
    return value or None


def load_data(parsed: Parsed) -> Any:
    """The training rows as TRL's script loads them, or None where none are named."""
    script, _, _, mixture = parsed
    if mixture.datasets:
        from trl import get_dataset

        return get_dataset(mixture)[script.dataset_train_split]
    if script.dataset_name:
        from datasets import load_dataset

        data = load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
        return data[script.dataset_train_split]
    return None


class _Trained(BaseException):
    """Leaves TRL's script after training, before it saves."""


def run_script(kind: TrainerKind, parsed: Parsed, save: bool = True) -> None:
    """TRL's own script: data, rewards, PEFT, training, saving; without `save` it ends when training has ended."""
    if save:
        _script(kind).main(*parsed)
        return
    trainers: list[Any] = []

    def leave_after_training(trainer: Any) -> None:
        train = trainer.train

        def train_and_leave(*args: Any, **kwargs: Any) -> NoReturn:
            train(*args, **kwargs)
            raise _Trained

        trainer.train = train_and_leave
        trainers.append(trainer)

    with on_built(kind, leave_after_training), suppress(_Trained):
        _script(kind).main(*parsed)
    for trainer in trainers:
        if hasattr(trainer, "end"):  # trackers and the process group; newer scripts do it after saving
            trainer.end()


@contextmanager
def on_built(kind: TrainerKind, listener: Callable[[Any], None]) -> Iterator[None]:
    """Inside the block, calls `listener(trainer)` for every trainer of this kind, plugins or not."""
    owner = trainer_class(kind)
    original = owner.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        listener(self)

    owner.__init__ = __init__
    try:
        yield
    finally:
        owner.__init__ = original


def is_async(function: Any) -> bool:
    """Whether TRL awaits a reward function: a coroutine function, or an object whose call is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def accelerator_found() -> bool:
    """Whether PyTorch sees CUDA, XPU, MPS or another accelerator."""
    import torch

    return bool(torch.accelerator.is_available())
