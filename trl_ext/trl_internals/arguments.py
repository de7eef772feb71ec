"""TRL's own command-line parser and the objects that it makes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

from trl import TrlParser

from trl_ext_hooks import TrainerKind

from ..errors import ConfigError, near
from .seams import trainer_class

Parsed = tuple[Any, Any, Any, Any]
"""Script, training, model and dataset arguments, as TRL's `main` functions take them."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One of TRL's own options.

    Attributes:
        hint: Its type, as TRL annotates it.
        default: Its default.
        help: What TRL's help says about it.
        choices: The values that it may have, None where TRL's parser has no list of them.
        read: Reads it from a text, for a list an entry of it.
    """

    hint: Any
    default: Any
    help: str
    choices: tuple[Any, ...] | None
    read: Callable[[str], Any]


class _Parser(TrlParser):
    """TRL's parser with YAML settings that were read before, and with our errors."""

    def error(self, message: str) -> NoReturn:
        if re.search(r"'none'|got none", message, re.IGNORECASE):
            message += "\nLeave the setting out for TRL's default."
        raise ConfigError(f"{message}\n`trl_ext train --help-trl` lists TRL's options.")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = near(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}.{hint}")

    def apply(self, settings: Mapping[str, Any]) -> list[str]:
        """Makes settings the defaults, and returns the names that are not TRL's."""
        known = {action.dest for action in self._actions}
        self.set_defaults_with_config(**{name: value for name, value in settings.items() if name in known})
        return [name for name in settings if name not in known]

    def given(self, argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Returns the options that a command line names, and what is none. Changes the parser's defaults."""
        for action in self._actions:
            action.default = argparse.SUPPRESS
        namespace, unknown = argparse.ArgumentParser.parse_known_args(self, list(argv))
        return vars(namespace), unknown

    def options(self) -> list[str]:
        return [action.dest for action in self._actions]

    def settings(self) -> dict[str, Setting]:
        """Returns TRL's options by name."""
        actions: dict[str, argparse.Action] = {}
        for action in self._actions:
            actions.setdefault(action.dest, action)  # `--no_NAME` comes second
        settings = {}
        for cls in self.dataclass_types:
            for name, hint in typing.get_type_hints(cls).items():
                if name not in actions:
                    continue
                action = actions[name]
                choices = None if action.choices is None else tuple(action.choices)
                text = (action.help or "").replace("%%", "%")
                read: Any = action.type or str
                settings[name] = Setting(hint, action.default, text, choices, read)
        return settings

    def refuse_none(self, given: Mapping[str, Any]) -> None:
        """Refuses `None` for a setting that holds a text or null, as it would be taken for a text of four letters.

        Raises:
            ConfigError: With what to write instead.
        """
        for action in self._actions:
            null = action.dest == "resume_from_checkpoint"  # which takes the word
            if action.type is str and action.default is None and given.get(action.dest) == "None" and not null:
                raise ConfigError(
                    f"{action.dest}: 'None' would be taken for a text. Leave the setting out, or write `{action.dest}: "
                    f"null` in the YAML file."
                )


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
    except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"TRL refuses these settings: {error}") from error
    training = parsed[1]
    training.resume_from_checkpoint = resume_value(training.resume_from_checkpoint)
    return (parsed[0], training, parsed[2], parsed[3])


def training_options(kind: TrainerKind, argv: Sequence[str]) -> dict[str, Any]:
    """Returns the training arguments that a command line names, as TRL reads them. Defaults are left out.

    Raises:
        ConfigError: An option is unknown, has a wrong value, or is no argument of training.
    """
    parser = trl_parser(kind)
    given, unknown = parser.given(argv)
    if unknown:
        close = difflib.get_close_matches(unknown[0].lstrip("-"), parser.options(), n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise ConfigError(
            f"{unknown[0]} is no option of `trl {kind}`.{hint} `trl_ext train --help-trl` lists TRL's options."
        )
    _, training, *_ = _script(kind).make_parser().dataclass_types
    outside = sorted(given.keys() - {field.name for field in dataclasses.fields(training)})
    if outside:
        raise ConfigError(f"`{outside[0]}` is no argument of training, and only these can be given here.")
    return given


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
