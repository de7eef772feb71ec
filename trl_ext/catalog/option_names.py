"""Names of the options of plugins, read from their source. Importing a plugin takes seconds, as it imports PyTorch."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from ..support import imports
from .builtins import BUILTINS, canonical
from .find import outside


def option_names(reference: str) -> list[str]:
    """Returns the names of a plugin's options in their order. There are none if the source cannot be read.

    Args:
        reference: A name, a file or `module:attribute`.
    """
    if imports.is_file(reference):
        file, attribute = imports.split_file(reference)
        return _of_plugin(file, attribute)
    points = outside().get(canonical(reference))
    target = BUILTINS.get(canonical(reference)) or (points[0].value if points else reference)
    module, _, attribute = target.partition(":")
    file_of_module = _file(module)
    return [] if file_of_module is None else _of_plugin(file_of_module, attribute.strip())


def _of_plugin(file: Path, name: str) -> list[str]:
    """Returns the options of a plugin class, or of the only class with options if no name is given."""
    if name:
        return _of_class(file, name)
    classes = [node.name for node in _statements(file) if isinstance(node, ast.ClassDef)]
    return next((names for cls in classes if (names := _of_class(file, cls))), [])


def _of_class(file: Path, name: str) -> list[str]:
    """Returns the options of a plugin class, its own or those of a class that it derives from."""
    found = _class(file, name)
    if found is None:
        return []
    file, node = found
    for statement in node.body:
        if isinstance(statement, ast.ClassDef) and statement.name == "Options":
            return _fields(file, statement)
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
            options = _class(file, statement.value.id)
            if "Options" in map(ast.unparse, statement.targets) and options is not None:
                return _fields(*options)
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    return next((names for base in bases if (names := _of_class(file, base))), [])


def _fields(file: Path, node: ast.ClassDef) -> list[str]:
    """Returns the fields of a dataclass, those of its bases first."""
    names: list[str] = []
    for base in node.bases:
        found = _class(file, base.id) if isinstance(base, ast.Name) else None
        names += [] if found is None else _fields(*found)
    own = [statement.target for statement in node.body if isinstance(statement, ast.AnnAssign)]
    return list(dict.fromkeys([*names, *(target.id for target in own if isinstance(target, ast.Name))]))


def _class(file: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """Returns a class with the file that defines it. Imports of the name are followed."""
    for node in _statements(file):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = _imported(file, node)
                    return None if source is None else _class(source, alias.name)
    return None


def _imported(file: Path, node: ast.ImportFrom) -> Path | None:
    """Returns the file that `from ... import` reads."""
    if not node.level:
        return _file(node.module or "")
    return _inside(file.parents[node.level - 1], (node.module or "").split("."))


def _file(module: str) -> Path | None:
    """Returns the file of a module that is not imported for it."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return None
    return _inside(Path(spec.origin).parent, rest) if rest else Path(spec.origin)


def _inside(folder: Path, parts: list[str]) -> Path | None:
    """Returns the file of a module inside the folder of a package."""
    place = folder.joinpath(*filter(None, parts))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def _statements(file: Path) -> list[ast.stmt]:
    """Returns the statements of a file. A file that cannot be read has none."""
    try:
        return ast.parse(file.read_text()).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
