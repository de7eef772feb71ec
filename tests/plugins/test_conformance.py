"""Every built-in passes the checks that outside plugins are given, on every trainer that it declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from trl_ext.catalog import builtins, declaration, find
from trl_ext.testing import conformance
from trl_ext.trl_internals.seams import trl_version

CLASSES = {name: find.find(name)[0] for name in builtins.BUILTINS}
LONG = {"vl-dac", "tools", "spae"}
EVERY = [
    # the long ones, and with other trainers than the first one, only in `make slow`
    pytest.param(name, kind, marks=[] if kind == cls.trainers[0] and name not in LONG else [pytest.mark.slow])
    for name, cls in CLASSES.items()
    if "run" not in declaration.implemented(cls)  # owns a whole run, which only its own tests can check
    for kind in cls.trainers
]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_built_in_conforms(name: str, kind: str, smoke: Any, tmp_path: Path) -> None:
    forwards = {"logps", "pair_logps", "pair_metrics"} & set(declaration.implemented(CLASSES[name]))
    if kind == "dpo" and forwards and trl_version() < Version("1.15"):
        pytest.skip("DPO's forward can be owned from TRL 1.15 on")
    requests, settings = smoke(kind, name)
    checks = conformance(name, tmp_path / "runs", requests[name], kinds=(kind,), **settings)
    assert len(checks) >= 5 and not [check for check in checks if not check.passed]


def test_every_file_of_settings_belongs_to_a_built_in() -> None:
    known = {name.replace("-", "_") for name in builtins.BUILTINS}
    assert {file.stem for file in (Path(__file__).parent / "smoke").glob("*.py")} <= known
