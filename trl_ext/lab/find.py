"""Look-up of tasks: built-in ones by name, others from files and modules."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError, near
from ..support import imports
from .definition import Task


def tasks() -> dict[str, Task]:
    """Returns the built-in tasks by name."""
    from .builtin import BUILTINS

    return {task.name: task for task in BUILTINS}


def task(reference: str) -> Task:
    """Returns the task behind a name, `module:attribute` or `file.py:attribute`.

    An attribute may be a `Task` or a function without arguments that makes one. It may be left out if the file or
    module has one task.

    Raises:
        ConfigError: There is no such task. The error names similar ones.
    """
    if imports.is_file(reference):
        file, attribute = imports.split_file(reference)
        if not file.is_file():
            raise ConfigError(f"task file {str(file)!r} does not exist (looked in {Path.cwd()}).")
        return _pick(vars(imports.load_file(file, "task", ConfigError)), attribute, str(file))
    if ":" in reference:
        module, _, attribute = reference.partition(":")
        return _pick(vars(imports.import_module(module, f"task {reference}", ConfigError)), attribute, module)
    known = tasks()
    name = reference.lower().replace("_", "-")
    if name not in known:
        raise ConfigError(
            f"no task is called {reference!r}.{near(name, known)} A task of your own is module:attribute or "
            f"file.py:attribute."
        )
    return known[name]


def _pick(names: dict[str, object], attribute: str, origin: str) -> Task:
    """Returns the attribute of a module, or its only task if none is named."""
    defined = {name: value for name, value in names.items() if isinstance(value, Task)}
    if attribute:
        if attribute not in names:
            raise ConfigError(f"{origin} has no attribute {attribute!r}.{near(attribute, defined)}")
        value = names[attribute]
        if callable(value):
            value = value()
        if not isinstance(value, Task):
            raise ConfigError(f"{origin}:{attribute} is {type(value).__name__}, not a trl_ext.lab.Task.")
        return value
    if len(defined) != 1:
        raise ConfigError(
            f"{origin} must define one task, found {len(defined)} ({', '.join(defined) or 'none'}). Choose: "
            f"{origin}:NAME"
        )
    return next(iter(defined.values()))
