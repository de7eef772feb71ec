"""One direction of imports: a room imports only rooms further right, and files of a room form no circle.

This list is the rule. `trl_ext/README.md` draws the same map.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = ROOT / "trl_ext"

RANKS: tuple[tuple[str, ...], ...] = (
    ("__init__", "__main__"),
    ("cli",),
    ("compare", "bench"),
    ("train",),
    ("testing", "campaign"),
    ("api",),
    ("inspection",),
    ("engine",),
    ("plan", "lab"),
    ("catalog", "environments"),
    ("trl_internals", "shared_prefix", "support", "tools"),
    ("errors", "_version"),
)
"""From left to right. Rooms of one rank do not import each other."""
RANK_OF = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
FILES = sorted(HOST.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def room_of(module: str) -> str:
    """`trl_ext.engine.stages.loss` -> `engine`; the package itself -> `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imported(file: Path, everywhere: bool = True) -> Iterator[str]:
    """Yields the modules of the host that a file imports, also inside functions if `everywhere`.

    What only type checkers read counts for rooms: it is a dependency of whoever reads the file.
    """
    tree = ast.parse(file.read_text())
    name = module_name(file)
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree) if everywhere else _at_import(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "trl_ext")
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            if source.split(".")[0] != "trl_ext":
                continue
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in MODULES else source


def _at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields the statements that run when a module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Returns the groups of nodes that lead back to themselves (strongly connected components of two or more)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return groups


def test_every_room_has_its_rank() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms == set(RANK_OF), f"not ranked: {rooms - set(RANK_OF)}; not on disk: {set(RANK_OF) - rooms}"


def test_at_most_six_loose_modules() -> None:
    loose = sorted(file.name for file in HOST.glob("*.py"))
    assert len(loose) <= 6, loose


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(HOST)))
def test_imports_point_to_rooms_further_right(file: Path) -> None:
    here = room_of(module_name(file))
    for target in imported(file):
        there = room_of(target)
        if there == "__init__" and target == "trl_ext" and here != "__init__":
            raise AssertionError(f"{file.name} imports the package itself; name the module")
        assert there == here or RANK_OF[there] > RANK_OF[here], f"{here} > {there}: {file.name} imports {target}"


def test_no_files_of_a_room_import_each_other_in_a_circle() -> None:
    arrows = {
        name: {target for target in imported(file) if target != name and room_of(target) == room_of(name)}
        for name, file in MODULES.items()
    }
    # a package that gathers its files is not a file of its own: `from .find import x` in it is no circle
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    files = {name: {target for target in targets if target not in packages} for name, targets in arrows.items()}
    assert circles({name: targets for name, targets in files.items() if name not in packages}) == []


def test_the_search_for_circles_finds_them() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
