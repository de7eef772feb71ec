"""Import order of the room: one direction without circles, as its README tells it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import trl_ext.shared_prefix

ROOM = Path(trl_ext.shared_prefix.__file__).parent
FILES = sorted(ROOM.rglob("*.py"))
# A module imports only modules that come later here. The room's own `__init__` comes before all of them.
ORDER = [
    "sampled_probes",
    "probes",
    "forward",
    "traits",
    "selfcheck",
    "comparison",
    "paths",
    "refusals",
    "attention_patch",
    "last_layer",
    "attention",
    "backends",
    "backends.flash",
    "backends.cpu",
    "backends.reference",
    "backends.interface",
    "flops",
    "packing",
    "layout",
    "tree",
    "log_probs",
    "model_parts",
    "errors",
]


def module_name(file: Path) -> str:
    """Returns the dotted name of a file within the room, "" for the room's `__init__`."""
    return ".".join(file.relative_to(ROOM).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_name(file) for file in FILES}


def imported_modules(file: Path) -> Iterator[str]:
    """Yields the modules of the room that a file imports, wherever the import stands."""
    package = list(file.parent.relative_to(ROOM).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("trl_ext") for alias in node.names), f"{file} imports absolutely"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert not (node.module or "").startswith("trl_ext"), f"{file} imports {node.module} absolutely"
        elif isinstance(node, ast.ImportFrom):
            steps_up = node.level - 1
            if steps_up > len(package):
                # One step above the room. Only the errors of the host may be imported from there.
                assert steps_up == len(package) + 1 and node.module == "errors", f"{file} imports {node.module}"
                continue
            base = [*package[: len(package) - steps_up], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                # `from . import x` names a module if there is one, and else something in the package itself.
                submodule = ".".join([*base, alias.name])
                yield submodule if submodule in MODULES else ".".join(base)


def test_the_order_names_every_file() -> None:
    assert sorted(ORDER) == sorted(MODULES - {""})


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_name(file) or "__init__")
def test_imports_point_one_way(file: Path) -> None:
    position = {name: index for index, name in enumerate(["", *ORDER])}
    importer = module_name(file)
    for imported in imported_modules(file):
        assert position[imported] > position[importer], f"{importer or '__init__'} imports {imported}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_name(file) or "__init__")
def test_no_import_hides_in_a_function(file: Path) -> None:
    functions = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        hidden = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not hidden, f"{function.name} in {file.name} imports {ast.unparse(hidden[0])}"


def test_the_check_sees_imports() -> None:
    imports = {module_name(file): set(imported_modules(file)) for file in FILES}
    assert {"paths", "selfcheck", "packing"} <= imports["forward"]
    assert {"layout", "backends.interface"} <= imports["backends.cpu"]
    assert set(ORDER) - {"backends.flash", "backends.cpu", "backends.reference", "backends.interface"} > imports[""]


def test_the_readme_tells_the_order() -> None:
    readme = (ROOM / "README.md").read_text()
    block = re.search(r"```text\n(\w+ >.*?)```", readme, re.DOTALL)
    assert block is not None
    assert re.findall(r"[\w.]+", block[1]) == ORDER
