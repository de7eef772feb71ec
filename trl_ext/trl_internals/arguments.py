"""TRL's own command-line parser and the objects that it makes."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from trl import TrlParser

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError
from .seams import trainer_class

Parsed = tuple[Any, Any, Any, Any]
"""Script, training, model and dataset arguments, as TRL's `main` functions take them."""


class _Parser(TrlParser):
    """TRL's parser with YAML settings that were read before, and with our errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n`trl_ext train --help-trl` lists TRL's options.")

    def apply(self, settings: Mapping[str, Any]) -> list[str]:
        """Makes settings the defaults, and returns the names that are not TRL's."""
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


@contextlib.contextmanager
def as_planned(processes: int, environment: Mapping[str, str]) -> Iterator[None]:
    """Lets TRL's arguments, during the block, believe that this process is one of several that a launcher started."""
    from accelerate.utils import patch_environment
    from transformers import TrainingArguments

    owner: Any = TrainingArguments
    before = owner.world_size
    owner.world_size = property(lambda self: processes)
    try:
        with patch_environment(**{**environment, "ACCELERATE_USE_CPU": "true"}):
            yield
    finally:
        owner.world_size = before


def parse_elsewhere(kind: TrainerKind, argv: Sequence[str], settings: Mapping[str, Any]) -> Parsed:
    """Parses settings for a machine that may have what this one lacks, such as a GPU.

    Raises:
        ConfigError: TRL refuses a value or a combination.
    """
    # of these settings TRL wants to see the device
    return parse(kind, [*argv, "--use_cpu", "true", "--tf32", "false"], settings)


def resume_value(value: Any) -> str | bool | None:
    """Returns the value of `resume_from_checkpoint`, whose `true`, `false` and `none` are words on a command line."""
    if isinstance(value, str):
        return {"true": True, "false": None, "none": None}.get(value.lower(), value)
    return value or None


def load_data(parsed: Parsed) -> Any:
    """Loads the training rows as TRL's script does. Returns None if no data are named."""
    splits = load_splits(parsed)
    return None if splits is None else splits[parsed[0].dataset_train_split]


def load_splits(parsed: Parsed) -> Any:
    """Loads all splits of the data by name as TRL's script does. Returns None if no data are named."""
    script, _, _, mixture = parsed
    if mixture.datasets:
        from trl import get_dataset

        return get_dataset(mixture)
    if script.dataset_name:
        from datasets import load_dataset

        return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)
    return None


def kept_columns(kind: TrainerKind, args: Any, columns: Sequence[str], needed: Collection[str] = ()) -> list[str]:
    """Returns the columns of the data that reach the trainer's reward functions. `remove_unused_columns` drops others.

    The trainer class is asked, without a trainer.

    Args:
        kind: The trainer.
        args: Its arguments.
        columns: The columns of the data.
        needed: The columns that plugins need, which the core keeps.
    """
    if not args.remove_unused_columns:
        return list(columns)
    asked = SimpleNamespace(_signature_columns=None)
    trainer_class(kind)._set_signature_columns_if_needed(asked)
    return [name for name in columns if name in asked._signature_columns or name in needed]
