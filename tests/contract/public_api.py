"""Every public name of the three packages that others import, with its signature: one line each.

python -m tests.contract.public_api      # writes the snapshot again, after a change was decided
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import trl_ext_hooks.toolkit

FILE = Path(__file__).parents[1] / "data" / "public_api.txt"
PACKAGES = ("trl_ext", "trl_ext.testing", "trl_ext.shared_prefix", "trl_ext_hooks")


def lines() -> list[str]:
    """Returns the public names in order."""
    found = [line for name in PACKAGES for line in _exported(importlib.import_module(name))]
    for info in pkgutil.iter_modules(trl_ext_hooks.toolkit.__path__):
        found += _written(importlib.import_module(f"trl_ext_hooks.toolkit.{info.name}"))
    return found


def _exported(module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        yield from _described(f"{module.__name__}.{name}", getattr(module, name))


def _written(module: ModuleType) -> Iterator[str]:
    """Yields what a module defines itself under public names. It has no `__all__`."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names = [statement.name]
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names = [statement.target.id]
        for name in names:
            if not name.startswith("_"):
                yield from _described(f"{module.__name__}.{name}", getattr(module, name))


def _described(path: str, value: Any) -> Iterator[str]:
    """Yields a line for a value, and for each public member of a class that this project defines."""
    if inspect.isclass(value):
        yield f"{path}{_signature(value)}" if value.__module__.startswith("trl_ext") else path
        for name, member in sorted(vars(value).items()):
            if name.startswith("_"):
                continue
            target = member.__func__ if isinstance(member, staticmethod | classmethod) else member
            yield f"{path}.{name}{_signature(target) if inspect.isfunction(target) else ''}"
    elif inspect.isfunction(value):
        yield f"{path}{_signature(value)}"
    else:
        yield path


def _signature(value: Any) -> str:
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))
    except (TypeError, ValueError):  # a class that is called in no one way
        return ""


def hooks() -> list[str]:
    """Returns the signature of every hook."""
    from trl_ext_hooks import specs

    found = [(name, value) for name, value in vars(specs).items() if inspect.isfunction(value)]
    return [f"hook {name}{inspect.signature(value)}" for name, value in sorted(found)]


def snapshot() -> str:
    """Returns the whole text of the snapshot."""
    return "\n".join([*lines(), *hooks()]) + "\n"


if __name__ == "__main__":
    FILE.write_text(snapshot())
