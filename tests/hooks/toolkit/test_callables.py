"""Functions and classes by their path: from modules, from the working directory, and what is wrong with the others."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trl_ext_hooks import UsageError
from trl_ext_hooks.toolkit.callables import call_together, load


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory."""
    (tmp_path / "callables_of_a_user.py").write_text(
        "def double(x):\n    return 2 * x\n\nclass Judge:\n    judge = staticmethod(double)\n    _hidden = 1\n\n"
        "number = 3\njudge = type('Bare', (), {'judge': staticmethod(double)})()\n"
    )
    (tmp_path / "callables_that_fail.py").write_text("raise RuntimeError('no luck')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "callables_of_a_user", raising=False)
    return "callables_of_a_user"


@pytest.mark.parametrize("separator", [".", ":"])
def test_functions_and_classes_of_the_working_directory(module: str, separator: str) -> None:
    assert load(f"{module}{separator}double")(4) == 8
    assert load(f"{module}{separator}Judge").__name__ == "Judge"


def test_an_object_with_a_method_of_another_name(module: str) -> None:
    assert load(f"{module}.judge", method="judge").judge(1) == 2
    with pytest.raises(ValueError, match="has no function 'judge'"):
        load(f"{module}.judge")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("double", "'double' is not a dotted path, such as my_tools.calculator"),
        ("{module}.number", "'{module}.number': '{module}' has no function 'number'; it has Judge, double"),
        ("{module}.none", "has no function 'none'; it has Judge, double"),
        ("no_such_module_here.f", "importing 'no_such_module_here' failed: ModuleNotFoundError: No module named"),
        ("callables_that_fail:f", "importing 'callables_that_fail' failed: RuntimeError: no luck"),
    ],
)
def test_what_cannot_be_loaded(module: str, path: str, expected: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(expected.format(module=module))):
        load(path.format(module=module))


def test_an_error_of_one_process_stops_all() -> None:
    exchanged: list[Any] = []

    def beside(other: str | None) -> Any:
        """The trainer of process 0, beside a process 1 with that failure."""
        return types.SimpleNamespace(gather_objects=lambda own: exchanged.append(own) or [*own, other])

    def fails() -> str:
        raise ValueError("no name")

    assert call_together(beside(None), lambda: "a name") == "a name"
    with pytest.raises(ValueError, match=r"^no name$"):
        call_together(beside(None), fails)
    with pytest.raises(UsageError, match=r"^stopped with another process: OSError: gone$"):
        call_together(beside("OSError: gone"), lambda: "a name")
    with pytest.raises(LookupError, match="OSError: gone"):
        call_together(beside("OSError: gone"), lambda: "a name", LookupError)
    assert exchanged == [[None], ["ValueError: no name"], [None], [None]]  # whatever happens, once
