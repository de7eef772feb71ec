"""Golden numbers: every case of every file of the folder, through the adapter of the file's method.

The folder is `tests/data/golden`, or the one that the environment variable TRL_EXT_GOLDEN_DIR names. The adapter of a
method is the function `compare(case)` in `adapters/METHOD.py`; it raises AssertionError where our numbers differ. A
file whose method has no adapter is an error.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("TRL_EXT_GOLDEN_DIR") or HERE.parent / "data" / "golden")
FILES = sorted(FOLDER.glob("*.json"))


def load(file: Path) -> Callable[[dict[str, Any]], None]:
    spec = importlib.util.spec_from_file_location(f"golden_adapter_{file.stem}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compare


ADAPTERS = {file.stem: load(file) for file in sorted((HERE / "adapters").glob("*.py"))}


def cases() -> list[Any]:
    """(method, case) of all files; a file that cannot be used becomes a case that fails."""
    found = []
    for file in FILES:
        content = json.loads(file.read_text())
        method = content.get("method", file.stem)
        for number, case in enumerate(content.get("cases") or [{}]):
            found.append(pytest.param(method, case, id=f"{file.stem}-{case.get('name', number)}"))
    return found


def check(method: str, case: dict[str, Any]) -> None:
    assert method in ADAPTERS, f"method {method!r} has no adapter; known: {', '.join(ADAPTERS)}"
    assert case, f"the golden file of {method!r} holds no cases"
    ADAPTERS[method](case)


def test_the_folder_holds_files() -> None:
    assert FILES, f"no golden files in {FOLDER}"


@pytest.mark.parametrize(("method", "case"), cases())
def test_golden(method: str, case: dict[str, Any]) -> None:
    check(method, case)


def test_a_method_without_an_adapter_is_an_error() -> None:
    with pytest.raises(AssertionError, match="method 'nobody' has no adapter"):
        check("nobody", {"name": "x"})


def test_a_file_without_cases_is_an_error() -> None:
    with pytest.raises(AssertionError, match="holds no cases"):
        check("gdpo", {})


@pytest.mark.parametrize("output", ["advantages_official", "per_reward_advantages", "pre_bn_advantages"])
def test_a_wrong_number_is_noticed(output: str) -> None:
    own = json.loads((HERE.parent / "data" / "golden" / "gdpo.json").read_text())["cases"]
    case = next(case for case in own if case["name"] == "binary_two_rewards")
    check("gdpo", case)
    values = case["outputs"][output]
    row = values if isinstance(values[0], float) else values[0]
    row[0] += 1e-5
    with pytest.raises(AssertionError):
        check("gdpo", case)
