"""Imports point one way, the private parts of TRL stay in one place, and TRL is still the one that was checked."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests import processes
from trl_ext.catalog import builtins, find
from trl_ext.trl_internals import seams

ROOT = Path(__file__).parents[2]
HOOKS, HOST, PLUGINS = ROOT / "hooks" / "trl_ext_hooks", ROOT / "trl_ext", ROOT / "plugins" / "trl_ext_plugins"
OPEN = {"trl_ext.shared_prefix"}
"""Modules of the host that every plugin may use, documented as such."""
HEAVY = {"trl", "transformers", "accelerate", "peft", "datasets"}
FINGERPRINTS = json.loads((ROOT / "tests" / "data" / "fingerprints.json").read_text())


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


def imports(file: Path, at_run_time: bool = False) -> Iterator[str]:
    """Absolute names of modules that a file imports; without what only type checkers read, if asked so."""
    tree = ast.parse(file.read_text())
    skipped: set[ast.AST] = set()
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("file", sources(HOOKS), ids=lambda file: str(file.relative_to(HOOKS)))
def test_hooks_know_neither_host_nor_plugins_nor_trl(file: Path) -> None:
    assert not {top(name) for name in imports(file)} & {"trl_ext", "trl_ext_plugins", *HEAVY}
    if file.parent.name != "toolkit":  # the package does not import this one by itself
        assert "torch" not in {top(name) for name in imports(file, at_run_time=True)}


@pytest.mark.parametrize("file", sources(HOST), ids=lambda file: str(file.relative_to(HOST)))
def test_the_host_knows_plugins_only_by_name(file: Path) -> None:
    assert "trl_ext_plugins" not in {top(name) for name in imports(file)}


@pytest.mark.parametrize("file", sources(PLUGINS), ids=lambda file: str(file.relative_to(PLUGINS)))
def test_plugins_use_the_contract_and_torch_only(file: Path) -> None:
    outside = {name for name in imports(file) if top(name) not in {*sys.stdlib_module_names, "trl_ext_hooks", "torch"}}
    assert outside <= OPEN, f"{file.name} imports {outside - OPEN}"


def test_no_plugin_imports_another() -> None:
    for file in sources(PLUGINS):
        package = file.parent.name if file.parent != PLUGINS else file.stem
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                home = file.parent if node.level == 1 else file.parent.parent
                assert home != PLUGINS, f"{package} imports {node.module} from its neighbours"


def test_source_roots_are_not_packages() -> None:
    """`import hooks` from the root of the repository would load modules twice."""
    for file in (*sources(HOOKS), *sources(HOST), *sources(PLUGINS)):
        assert not {top(name) for name in imports(file)} & {"hooks", "plugins"}, file


# --- one way to the terminal ------------------------------------------------------------------------------------------

WRITERS = {HOST / "support" / "console.py", HOST / "support" / "tables.py"}
"""The files that use rich. Every other text goes through them, so that no text of a user is read as markup."""


@pytest.mark.parametrize(
    "file",
    [file for file in (*sources(HOST), *sources(PLUGINS), *sources(HOOKS)) if file not in WRITERS],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_rich_stays_in_two_files(file: Path) -> None:
    assert {name for name in imports(file, at_run_time=True) if top(name) == "rich"} <= {"rich.text"}
    words = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert not words & {"from_markup", "render_str"}, "read as markup"


def test_consoles_read_no_markup() -> None:
    """Every call in the two files that could read markup says that it does not, or gets a text that is built."""
    seen = set()
    for file in sorted(WRITERS):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("Console", "TextColumn"):
                markup = [keyword.value for keyword in node.keywords if keyword.arg == "markup"]
                assert [ast.unparse(value) for value in markup] == ["False"], f"{file.name}:{node.lineno}"
            if name in ("status", "add_column", "add_row"):
                assert "Text(" in ast.unparse(node), f"{file.name}:{node.lineno}"
            seen.add(name)
    assert {"Console", "TextColumn", "status", "add_column", "add_row"} <= seen


# --- TRL's private parts ----------------------------------------------------------------------------------------------


def _private_names() -> set[str]:
    """Returns what TRL's trainers keep on themselves and name with an underscore, read from their source."""
    modules = {cls.__module__ for kind in ("grpo", "rloo", "dpo") for cls in seams.trainer_class(kind).__mro__}
    names: set[str] = set()
    for module in modules:
        if top(module) != "trl":
            continue
        for node in ast.walk(ast.parse(Path(str(sys.modules[module].__file__)).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                names.add(node.name)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


PRIVATE = _private_names()


@pytest.mark.parametrize(
    "file",
    [file for file in (*sources(HOST), *sources(PLUGINS), *sources(HOOKS)) if "trl_internals" not in file.parts],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_private_names_of_trl_stay_in_one_room(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        # what a class of ours keeps on itself may have such a name too
        own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        name = getattr(node, "attr", getattr(node, "value", None)) if not own else None
        if isinstance(node, ast.Attribute | ast.Constant) and isinstance(name, str) and name in PRIVATE:
            raise AssertionError(f"{file.name}:{node.lineno} uses {name} of TRL's trainers")
    deep = {name for name in imports(file) if re.match(r"trl\.(trainer|models|extras|kernels|data_utils)", name)}
    assert not deep, f"{file.name} imports {deep}; go through trl_ext.trl_internals"


def test_the_check_above_looks_for_something() -> None:
    assert {"_calculate_rewards", "_compute_loss", "_prepare_inputs", "_tokenizer", "_metrics"} <= PRIVATE
    used = {
        node.attr
        for node in ast.walk(ast.parse((HOST / "trl_internals" / "trainer_state.py").read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert used & PRIVATE


def test_every_seam_exists_in_this_trl() -> None:
    everything = {user for seam in seams.SEAMS for user in seam.users}
    for kind in ("grpo", "rloo", "dpo"):
        if kind == "dpo" and seams.trl_version() < seams.Version("1.15"):
            everything -= {"logps", "pair_logps", "pair_metrics"}
        seams.check_seams(kind, everything)


# --- the table of built-ins -------------------------------------------------------------------------------------------


def test_the_table_of_built_ins_equals_the_modules_on_disk() -> None:
    modules = {path.stem for path in PLUGINS.iterdir() if path.suffix == ".py" and path.stem != "__init__"}
    modules |= {path.parent.name for path in PLUGINS.glob("*/__init__.py")}
    named = {value.partition(":")[0].removeprefix("trl_ext_plugins.") for value in builtins.BUILTINS.values()}
    outside_of_plugins = {name for name in named if name.startswith("trl_ext.")}
    assert named - outside_of_plugins == modules


@pytest.mark.parametrize("name", builtins.BUILTINS)
def test_every_built_in_passes_the_door_that_strangers_take(name: str) -> None:
    cls, origin, _ = find.find(name)
    assert cls.name == name and origin == "built in"
    assert cls.summary and find.find(builtins.BUILTINS[name])[0] is cls


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_trl_is_the_one_that_was_checked() -> None:
    """The methods that we wrap, as syntax trees. An upstream edit of one is looked at before it is trusted."""
    version, found = str(seams.trl_version()), seams.fingerprints()
    if version not in FINGERPRINTS:
        pytest.skip(f"trl {version} has no fingerprints; known: {', '.join(FINGERPRINTS)}")
    known = FINGERPRINTS[version]
    changed = sorted(key for key in known.keys() | found.keys() if known.get(key) != found.get(key))
    assert not changed, (
        f"trl {version} differs from the release of that number in {', '.join(changed)}. Compare these methods with "
        f"the release, adapt trl_ext/trl_internals if needed, then put what seams.fingerprints() returns into "
        f"tests/data/fingerprints.json."
    )


def test_the_tested_versions_have_fingerprints() -> None:
    assert set(seams.TESTED) <= set(FINGERPRINTS)
    for version, table in FINGERPRINTS.items():
        assert set(table) <= {f"{kind}.{seam.name}" for seam in seams.SEAMS for kind in seam.kinds}, version
        assert {"grpo._compute_loss", "rloo._compute_loss", "dpo._compute_loss", "grpo._prepare_inputs"} <= set(table)


def test_fingerprints_ignore_comments_and_see_code() -> None:
    def digest(source: str) -> str:
        return seams.digest(source)

    plain = digest("def f(x):\n    return x + 1\n")
    assert digest('def f(x):\n    """Doc."""\n    # why\n    return x+1\n') == plain
    assert digest("def f(x):\n    return x + 2\n") != plain


# --- the light entrance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["trl_ext", "trl_ext_hooks", "trl_ext.catalog.find", "trl_ext.cli.main"])
def test_importing_is_light(module: str) -> None:
    heavy = {"torch", "trl", "transformers", "numpy", "pydantic"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = processes.run_python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_is_public_is_what_is_listed() -> None:
    import trl_ext
    import trl_ext_hooks

    for name in trl_ext.__all__:
        assert getattr(trl_ext, name) is not None
    public = {
        name
        for name, value in vars(trl_ext_hooks).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(trl_ext_hooks.__all__)
    with pytest.raises(AttributeError, match="module 'trl_ext' has no attribute 'enabel'"):
        trl_ext.enabel  # noqa: B018


def test_tests_start_programs_with_a_limit() -> None:
    """A program that hangs must fail its test, and with what it has started it must end."""
    unlimited = re.compile(r"subprocess\.(run|call|check_call|check_output)\(")
    found = [str(file.relative_to(ROOT)) for file in sources(ROOT / "tests") if unlimited.search(file.read_text())]
    assert not found, f"{found}: use tests/processes.py"


def test_no_test_joins_a_process_group_itself() -> None:
    """Gloo ends by waiting for its thread with the interpreter in its hands, which that thread may be waiting for."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in sources(ROOT / "tests")
        if "scripts" not in file.parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
        and (getattr(node, "attr", None) or getattr(node, "id", None)) == "init_process_group"
    ]
    assert not found, f"{found}: use a process of its own, see tests/processes.py"
